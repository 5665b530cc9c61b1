"""The Batch API of an endpoint: files go up, batches are made and watched, results come down."""

from __future__ import annotations

import os
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ultrafuser.errors import SynthesisError
from ultrafuser.synthesis.asking.endpoints.client import Client
from ultrafuser.synthesis.asking.endpoints.refusal import one_line

LABEL = "ultrafuser_batch"  # in a batch's metadata: the name of its input file here
NUM_LISTED = 100  # of an account's latest batches, when one is looked for
T = TypeVar("T")


class NotNowError(Exception):
    """The API refuses in a way that may pass; one line."""


@dataclass(frozen=True, slots=True)
class BatchState:
    """How far a batch is.

    Attributes:
        is_ended: However it ended.
        files: Ids of its results and errors.
        problem: Why it was not begun at all.
    """

    status: str
    is_ended: bool
    files: tuple[str, ...] = ()
    problem: str | None = None


class BatchApi:
    """Of one client's address. Every method raises NotNowError, or SynthesisError where trying again is no use."""

    def __init__(self, client: Client) -> None:
        self.client = client

    async def submit(self, path: Path, url: str) -> str:
        """Upload a file of requests and make a batch of it; gives the batch's id."""
        api = self.client.openai
        with path.open("rb") as file:
            uploaded = await self._call(api.files.create(file=(path.name, file), purpose="batch", **self._extra))
        made = api.batches.create(
            input_file_id=uploaded.id,
            endpoint=url,  # type: ignore[arg-type]
            completion_window="24h",
            metadata={LABEL: path.stem},
            **self._extra,
        )
        return (await self._call(made)).id

    async def find(self, path: Path) -> str | None:
        """The id of the batch that was made of this file, if it was."""
        page = await self._call(self.client.openai.batches.list(limit=NUM_LISTED, **self._extra))
        return next((b.id for b in page.data if (b.metadata or {}).get(LABEL) == path.stem), None)

    async def state(self, batch: str) -> BatchState:
        """How far a batch is."""
        found = await self._call(self.client.openai.batches.retrieve(batch, **self._extra))
        errors = found.errors.data if found.errors is not None and found.errors.data else []
        problem = one_line("; ".join(str(error.message) for error in errors)) or found.status
        return BatchState(
            found.status,
            found.status in ("completed", "failed", "expired", "cancelled"),
            tuple(file for file in (found.output_file_id, found.error_file_id) if file),
            problem if found.status == "failed" else None,
        )

    async def download(self, file: str, to: Path) -> None:
        """Fetch a file of results; it is there whole or not at all."""
        partial = to.with_suffix(".part")
        answer = await self._call(self.client.openai.files.content(file, **self._extra))
        with partial.open("wb") as out:
            out.write(answer.content)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(to)

    @property
    def _extra(self) -> dict[str, Any]:
        return {"extra_headers": self.client.headers} if self.client.headers else {}

    async def _call(self, call: Awaitable[T]) -> T:
        import openai

        where = self.client.help.where
        try:
            return await call
        except openai.APIStatusError as error:
            said = self.client.clean(error.response.text[:2000])
            if error.status_code in (408, 409, 425, 429) or error.status_code >= 500:
                raise NotNowError(f"{where} answers {error.status_code}: {said}") from None
            help_ = {401: self.client.help.key, 403: self.client.help.key}.get(
                error.status_code, "does it offer files and batches? If not, set the endpoint's batch to files or no"
            )
            raise SynthesisError(f"{where} answers {error.status_code} about batches: {said} - {help_}") from None
        except openai.APIConnectionError as error:
            raise NotNowError(f"{where}: {self.client.clean(str(error.__cause__ or error))}") from None
