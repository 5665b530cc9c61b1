"""Requests and answers as files of the OpenAI Batch format: JSON lines, named by `custom_id`, answered in any order."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel

from ultrafuser.errors import DataError
from ultrafuser.files import write_text_atomically
from ultrafuser.synthesis.asking.budget import Share, most
from ultrafuser.synthesis.asking.endpoints.client import Client
from ultrafuser.synthesis.node import Node, content_key

MAX_LINES = 50_000  # of one file: OpenAI's limits
MAX_BYTES = 190_000_000  # theirs is 200 MB


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of requests, written whole.

    Attributes:
        url: What all of them are posted to.
        share: The most that they can take together.
    """

    path: Path
    url: str
    num_lines: int
    share: Share


class Sent(BaseModel):
    """The file beside an input file: what became of it.

    Attributes:
        tokens: The most that its requests can take.
        batch: Its id; None: none was made, or the process was killed before it was remembered.
    """

    url: str
    tokens: int
    cost: float
    batch: str | None = None


@dataclass(frozen=True, slots=True)
class ResultLine:
    """One line of a file of results.

    Attributes:
        body: The response as text, or the error where there was none.
    """

    key: str
    status: int
    body: str


@dataclass
class Damage:
    """What was wrong with a file of results.

    Attributes:
        num_broken: Lines that are no result.
        is_cut: The last line is one of them.
    """

    num_broken: int = 0
    is_cut: bool = False


def request_line(node: Node, client: Client) -> bytes:
    """A node as a line of a batch's input."""
    request = node.request
    body = client.body(request, with_schema=client.config.json_schema != "never") | client.config.extra_body
    line = {"custom_id": node.key, "method": "POST", "url": url_of(node), "body": body}
    return json.dumps(line, ensure_ascii=True).encode() + b"\n"


def url_of(node: Node) -> str:
    """What a node is posted to."""
    return "/v1/chat/completions" if node.request.prompt is None else "/v1/completions"


def write_batches(
    nodes: Iterable[Node],
    client: Client,
    folder: Path,
    *,
    fits: Share | None = None,
    max_lines: int = MAX_LINES,
    max_bytes: int = MAX_BYTES,
) -> list[InputFile]:
    """Write nodes as input files, split at what one may hold; each is there whole or not at all.

    Args:
        nodes: Of the client's endpoint.
        fits: Stop before all files together can take more; None: write all nodes.

    Raises:
        DataError: A file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    open_: dict[str, _Part] = {}
    done: list[InputFile] = []
    tokens, cost = 0, 0.0
    try:
        for node in nodes:
            line, url = request_line(node, client), url_of(node)
            share = most(node.request, client.config, is_batch=True)
            tokens, cost = tokens + share.tokens, cost + share.cost
            if fits is not None and (tokens > fits.tokens or cost > fits.cost):
                break
            part = open_.get(url)
            if part is not None and (part.num_lines >= max_lines or part.num_bytes + len(line) > max_bytes):
                done.append(open_.pop(url).finish())
                part = None
            if part is None:
                part = open_[url] = _Part.start(folder, url, node.key)
            part.add(line, share)
        done += [part.finish() for part in open_.values()]
    except OSError as error:
        raise DataError(
            f"cannot write a batch to {folder}: {error.strerror or error}. Free space, then go on"
        ) from error
    finally:
        for part in open_.values():
            part.drop()
    return done


def read_keys(path: Path) -> Iterator[str]:
    """The nodes in an input file."""
    with path.open("rb") as file:
        for line in file:
            yield json.loads(line)["custom_id"]


def read_results(path: Path, damage: Damage) -> Iterator[ResultLine]:
    """The lines of a file of results; those that are none are counted."""
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            result = _result(line)
            if result is None:
                damage.num_broken += 1
            else:
                yield result
            damage.is_cut = result is None


def _result(line: bytes) -> ResultLine | None:
    try:
        entry: Any = json.loads(line)
        key, response, error = entry["custom_id"], entry.get("response"), entry.get("error")
        if not isinstance(key, str):
            return None
        if isinstance(response, dict) and "status_code" in response:
            return ResultLine(key, int(response["status_code"]), json.dumps(response.get("body")))
        # Expired and cancelled lines have no response: an error that may pass.
        return ResultLine(key, 500, json.dumps({"error": error if error else {"message": "no response"}}))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


@dataclass
class _Part:
    """An input file while it is written, under another name."""

    path: Path
    url: str
    file: IO[bytes]
    num_lines: int = 0
    num_bytes: int = 0
    tokens: int = 0
    cost: float = 0.0
    is_finished: bool = field(default=False)

    @classmethod
    def start(cls, folder: Path, url: str, first: str) -> _Part:
        path = folder / f"{content_key(first, url, time.time_ns())[:16]}.jsonl"
        return cls(path, url, path.with_suffix(".part").open("wb"))

    def add(self, line: bytes, share: Share) -> None:
        self.file.write(line)
        self.num_lines, self.num_bytes = self.num_lines + 1, self.num_bytes + len(line)
        self.tokens, self.cost = self.tokens + share.tokens, self.cost + share.cost

    def finish(self) -> InputFile:
        sent = Sent(url=self.url, tokens=self.tokens, cost=self.cost)
        write_text_atomically(sent.model_dump_json(), self.path.with_suffix(".json"))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.path.with_suffix(".part").replace(self.path)
        self.is_finished = True
        return InputFile(self.path, self.url, self.num_lines, Share(self.tokens, self.cost))

    def drop(self) -> None:
        if not self.is_finished:
            self.file.close()
            self.path.with_suffix(".part").unlink(missing_ok=True)
