"""The second way of asking: an endpoint's waiting nodes go out as batches, and their results come in, in any order.

What is out is known by the files in the run's folder alone, so a killed process goes on where it was: `X.jsonl` holds
requests, `X.json` beside it the id of the batch made of it; files that are done end in `.done`. A node stays waiting
until its result is recorded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from ultrafuser.errors import DataError, SynthesisError
from ultrafuser.files import read_json, write_text_atomically
from ultrafuser.synthesis.asking.batch_files import (
    Damage,
    InputFile,
    ResultLine,
    Sent,
    read_keys,
    read_results,
    write_batches,
)
from ultrafuser.synthesis.asking.budget import Budget, Share, most
from ultrafuser.synthesis.asking.endpoints.batch_api import BatchApi, NotNowError
from ultrafuser.synthesis.asking.endpoints.client import Client
from ultrafuser.synthesis.asking.outcome import Outcome, Read, finish, outcome_of_refusal
from ultrafuser.synthesis.asking.writer import Run, Writer
from ultrafuser.synthesis.node import Answer, Node
from ultrafuser.synthesis.queue import Queue
from ultrafuser.synthesis.recipe import SynthesisRecipe

SETTLE_S = 3.0  # without new nodes: then a batch is made of those that wait
FIRST_POLL_S, LAST_POLL_S = 5.0, 60.0
CHUNK = 500  # lines of results in memory


@dataclass
class BatchReport:
    """What files of results held.

    Attributes:
        num_repeated: Results of nodes that were answered before, or twice in the files.
        num_unknown: Results of no node that is known.
        num_broken: Lines that are no results.
        num_cut: Files whose last line is one of them.
    """

    num_answers: int = 0
    num_refused: int = 0
    num_repeated: int = 0
    num_unknown: int = 0
    num_broken: int = 0
    num_cut: int = 0

    def text(self) -> str:
        """In one line."""
        return (
            f"{self.num_answers} answers, {self.num_refused} refused, {self.num_repeated} known before, "
            f"{self.num_unknown} of no request here, {self.num_broken} broken lines, {self.num_cut} files cut short"
        )


class BatchDesk:
    """Sends out and takes in the batches of one endpoint.

    Attributes:
        report: Of all results so far.
        is_done: Nothing waits and nothing is out.
        stalled: Why it can only go on when somebody has done something; None: it can.
        error: Why it does not go on at all.
    """

    def __init__(
        self,
        client: Client,
        recipe: SynthesisRecipe,
        queue: Queue,
        run: Run,
        read: Read,
        writer: Writer,
        budget: Budget,
        changed: Callable[[], None],
        tell: Callable[[str], None],
    ) -> None:
        self.client, self.config, self.recipe = client, client.config, recipe
        self.api = BatchApi(client)
        self.folder = recipe.run_folder / "batches" / client.name
        self.results = self.folder / "results"
        self._queue, self._run, self._read, self._writer, self._budget = queue, run, read, writer, budget
        self._changed, self._tell = changed, tell
        self._woken, self._woken_at = asyncio.Event(), time.monotonic()
        self.settle_s, self.first_poll_s = SETTLE_S, FIRST_POLL_S
        self._poll_s = 0.0
        self.report = BatchReport()
        self.is_done = False
        self.stalled: SynthesisError | None = None
        self.error: Exception | None = None

    def wake(self) -> None:
        """New nodes may be waiting."""
        self.is_done, self.stalled, self._woken_at = False, None, time.monotonic()
        self._woken.set()

    def prepare(self) -> None:
        """Clear away what a killed process was writing, and count what it has sent; before `work`.

        Raises:
            DataError: The folder cannot be written, or is damaged.
        """
        try:
            self.results.mkdir(parents=True, exist_ok=True)
            for path in (*self.folder.glob("*.part"), *self.results.glob("*.part")):
                path.unlink()
        except OSError as error:
            raise DataError(f"cannot write {self.results}: {error.strerror or error}") from error
        for path in self._open_inputs():
            self._budget.hold(self._share(path))

    async def work(self) -> None:
        """Go on until cancelled, or until `error` says why not."""
        try:
            async with self.client:
                while True:
                    await self._step()
        except Exception as error:
            self.error = error

    async def _step(self) -> None:
        self._woken.clear()
        await self._settle()
        try:
            await (self._collect() if self.config.batch == "api" else self._take_in())
            written = await self._write_waiting()
            if self.config.batch == "api":
                for input_ in written:
                    await self._send(input_)
        except NotNowError:
            pass  # the next step tries again
        is_out = bool(self._open_inputs())
        if self.config.batch == "files" and is_out:
            self.stalled = SynthesisError(
                f"requests wait in {self.folder}/*.jsonl: have them answered as OpenAI batches, put the files of "
                f"results into {self.results} and run the same command again"
            )
        elif not is_out and not self._woken.is_set():
            self.is_done = True
        self._changed()
        self._poll_s = min(max(self._poll_s * 1.5, self.first_poll_s), LAST_POLL_S)
        await self._wait(self._poll_s if is_out and self.config.batch == "api" else None)

    async def _settle(self) -> None:
        while (left_s := self._woken_at + self.settle_s - time.monotonic()) > 0:
            await asyncio.sleep(left_s)

    async def _wait(self, wait_s: float | None) -> None:
        try:
            async with asyncio.timeout(wait_s):
                await self._woken.wait()
        except TimeoutError:
            return

    # ---------------------------------------------------------------------------------------------- out

    async def _write_waiting(self) -> list[InputFile]:
        """Write what waits and is not out yet, as far as the budget goes."""
        out = {bytes.fromhex(key) for path in self._open_inputs() for key in read_keys(path)}
        fits = self._budget.left()

        def write() -> tuple[list[InputFile], Node | None]:
            waiting = (n for n in self._queue.waiting(self.client.name) if bytes.fromhex(n.key) not in out)
            first = next(waiting, None)
            if first is None:
                return [], None
            return write_batches(chain([first], waiting), self.client, self.folder, fits=fits), first

        written, first = await self._run(write)
        for input_ in written:
            self._budget.hold(input_.share)
        if first is not None and not written and not self._budget.num_reserved:
            raise SynthesisError(self._budget.reached(most(first.request, self.config, is_batch=True)))
        return written

    async def _send(self, input_: InputFile) -> None:
        batch = await self.api.submit(input_.path, input_.url)
        self._remember(input_.path, self._sent(input_.path).model_copy(update={"batch": batch}))

    # ---------------------------------------------------------------------------------------------- in

    async def _collect(self) -> None:
        """Look after what is out; take in what has ended."""
        for path in self._open_inputs():
            sent = self._sent(path)
            if sent.batch is None:
                # A kill, or a refusal, came between the making of the batch and its being remembered here.
                found = await self.api.find(path) or await self.api.submit(path, sent.url)
                sent = sent.model_copy(update={"batch": found})
                self._remember(path, sent)
            assert sent.batch is not None
            state = await self.api.state(sent.batch)
            if state.problem is not None:
                self._close(path)
                raise SynthesisError(f"{self.client.help.where} refuses batch {sent.batch}: {state.problem}")
            if not state.is_ended:
                continue
            before = self.report.num_answers + self.report.num_refused
            for number, file in enumerate(state.files):
                result = self.results / f"{path.stem}-{number}.jsonl"
                await self.api.download(file, result)
                await self._take_in_file(result)
            self._close(path)
            self._poll_s = 0.0
            if self.report.num_answers + self.report.num_refused == before and self.report.num_repeated == 0:
                raise SynthesisError(
                    f"{self.client.help.where}: batch {sent.batch} is {state.status} without any result"
                )

    async def _take_in(self) -> None:
        """Read the files of results that somebody put there."""
        seen: set[bytes] = set()
        for path in sorted(self.results.glob("*.jsonl")):
            seen |= await self._take_in_file(path)
        for path in self._open_inputs():
            if any(bytes.fromhex(key) in seen for key in read_keys(path)):
                self._close(path)  # what had no result in these files goes out anew

    async def _take_in_file(self, path: Path) -> set[bytes]:
        damage, seen = Damage(), set[bytes]()
        try:
            lines = read_results(path, damage)
            while chunk := list(islice(lines, CHUNK)):
                seen |= await self._take_in_lines(chunk)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
        self.report.num_broken += damage.num_broken
        self.report.num_cut += damage.is_cut
        path.replace(path.with_suffix(".done"))
        self._tell(f"{path}: {self.report.text()} so far")
        return seen

    async def _take_in_lines(self, lines: Sequence[ResultLine]) -> set[bytes]:
        by_key = {line.key: line for line in lines}
        keys = list(by_key)
        known = await self._run(lambda: self._queue.known(keys))
        claimed = await self._run(lambda: self._queue.take(keys))
        self.report.num_unknown += len(keys) - len(known)
        self.report.num_repeated += len(lines) - len(keys) + len(known) - len(claimed)
        outcomes = []
        for one in claimed:
            line = by_key[one.node.key]
            result = self.client.read(one.node.request, line.status, {}, line.body, is_batch=True)
            if isinstance(result, Answer):
                outcome, bug = finish(one.node, result, self._read)
                self.error = self.error or bug
                self.report.num_answers += 1
            else:
                limit = self.recipe.limits.max_attempts
                outcome = outcome_of_refusal(one, result, max_attempts=limit, backoff_s=1.0, has_answered=True)
                self.report.num_refused += 1
                if result.kind == "fatal":
                    self.error = self.error or SynthesisError(result.message)
            outcomes.append(outcome)
        await self._writer.write(outcomes, self._written)
        if self.error is not None:
            raise self.error
        return {bytes.fromhex(key) for key in known}

    def _written(self, outcome: Outcome) -> None:
        if outcome.finished is not None:
            self._budget.add(outcome.finished.answer)

    # ---------------------------------------------------------------------------------------------- files

    def _open_inputs(self) -> list[Path]:
        return sorted(self.folder.glob("*.jsonl"))

    def _sent(self, path: Path) -> Sent:
        return read_json(path.with_suffix(".json"), Sent, what="state of a batch")

    def _share(self, path: Path) -> Share:
        sent = self._sent(path)
        return Share(sent.tokens, sent.cost)

    def _remember(self, path: Path, sent: Sent) -> None:
        write_text_atomically(sent.model_dump_json(), path.with_suffix(".json"))

    def _close(self, path: Path) -> None:
        self._budget.settle(self._share(path), None)
        path.replace(path.with_suffix(".done"))
        path.with_suffix(".json").unlink(missing_ok=True)
