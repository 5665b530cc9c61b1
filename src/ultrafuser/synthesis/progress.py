"""The live table of a run: how far every stage is, how fast it goes, what it has cost, how long it will take.

On a terminal it is one table that is drawn anew; elsewhere a line every half minute. Both go to stderr.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ultrafuser.synthesis.asking.writer import Recorded
from ultrafuser.synthesis.queue import Spent
from ultrafuser.synthesis.storage.counts import StageCount

if TYPE_CHECKING:
    from rich.table import Table

WINDOW_S = 30.0  # over which speed is measured
LINE_S = 30.0  # between two plain lines
REDRAWN_PER_S = 2


@dataclass
class StageRow:
    """A stage as the table shows it."""

    done: int = 0
    waiting: int = 0
    failed: int = 0
    unreadable: int = 0
    kept: int = 0
    dropped: int = 0
    tokens: int = 0
    cost: float = 0.0

    @classmethod
    def of(cls, count: StageCount) -> StageRow:
        """A stage as the store counts it."""
        nodes, items = count.nodes, count.items
        return cls(
            done=nodes.get("answered", 0) + nodes.get("unreadable", 0),
            waiting=nodes.get("waiting", 0) + nodes.get("claimed", 0),
            failed=nodes.get("failed", 0),
            unreadable=nodes.get("unreadable", 0),
            kept=items.get("kept", 0) + items.get("replaced", 0),
            dropped=items.get("dropped", 0),
            tokens=count.spent.prompt_tokens + count.spent.completion_tokens,
            cost=count.spent.cost,
        )


@dataclass
class Progress:
    """All numbers of a run, brought up to date by what is recorded (`pipeline.Watch`).

    Attributes:
        clock: In seconds; tests give another.
    """

    clock: Callable[[], float] = time.monotonic
    rows: dict[tuple[str, str], StageRow] = field(default_factory=dict)
    last_error: str = ""
    _recent: deque[tuple[float, int, int]] = field(default_factory=deque)  # time, answers, tokens
    _began: float | None = None

    def start(self, counts: Sequence[StageCount]) -> None:
        """How far every stage is."""
        self.rows = {(count.domain, count.stage): StageRow.of(count) for count in counts}
        self._began = self.clock() if self._began is None else self._began

    def recorded(self, recorded: Recorded) -> None:
        """What one transaction wrote."""
        spent = Spent()
        for one in recorded.finished:
            row = self.rows.setdefault((one.node.domain, one.node.stage), StageRow())
            tokens = one.answer.prompt_tokens + one.answer.completion_tokens
            row.done, row.waiting = row.done + 1, max(0, row.waiting - 1)
            row.unreadable += one.unreadable is not None
            row.tokens, row.cost = row.tokens + tokens, row.cost + one.answer.cost
            spent = Spent(spent.num_answers + 1, spent.prompt_tokens + tokens)
        for failed in recorded.failed:
            node = recorded.nodes[failed.key]
            row = self.rows.setdefault((node.domain, node.stage), StageRow())
            row.failed, row.waiting = row.failed + 1, max(0, row.waiting - 1)
        for error in [one.error for one in recorded.postponed] + [one.error for one in recorded.failed]:
            self.last_error = error
        self._recent.append((self.clock(), spent.num_answers, spent.prompt_tokens))
        self._forget()

    @property
    def total(self) -> StageRow:
        """All rows together."""
        total = StageRow()
        for row in list(self.rows.values()):
            for name, value in vars(row).items():
                setattr(total, name, getattr(total, name) + value)
        return total

    def speed(self) -> tuple[float, float]:
        """Answers and tokens a second, over the last half minute or since the start."""
        self._forget()
        now = self.clock()
        seconds = min(WINDOW_S, now - (now if self._began is None else self._began))
        if seconds <= 0:
            return 0.0, 0.0
        recent = list(self._recent)
        return sum(number for _, number, _ in recent) / seconds, sum(tokens for _, _, tokens in recent) / seconds

    def left_s(self) -> float | None:
        """Until what is planned is answered, at this speed; None: it stands still."""
        speed, waiting = self.speed()[0], self.total.waiting
        return 0.0 if not waiting else waiting / speed if speed > 0 else None

    def line(self) -> str:
        """All in one line."""
        total, (answers, tokens) = self.total, self.speed()
        left = self.left_s()
        text = (
            f"{total.done:,} done, {total.waiting:,} waiting, {total.failed:,} failed, {total.dropped:,} dropped; "
            f"{answers:.1f} requests/s, {tokens:,.0f} tokens/s; {total.tokens:,} tokens, {total.cost:.2f} spent; "
            f"{'standing still' if left is None else _duration(left) + ' left of what is planned'}"
        )
        return f"{text}; last problem: {self.last_error}" if self.last_error and left is None else text

    def table(self) -> Table:
        """All, for a terminal."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), caption=self.line(), caption_justify="left")
        heads = ["domain", "stage", "done", "waiting", "failed", "unread", "kept", "dropped", "tokens", "money"]
        for head in heads:
            is_name = head in heads[:2]
            table.add_column(
                head, justify="left" if is_name else "right", no_wrap=True, min_width=7 if is_name else None
            )
        before = None
        for (domain, stage), row in list(self.rows.items()):
            counts = [row.done, row.waiting, row.failed, row.unreadable, row.kept, row.dropped, row.tokens]
            table.add_row("" if domain == before else domain, stage, *(f"{n:,}" for n in counts), f"{row.cost:.2f}")
            before = domain
        return table

    def _forget(self) -> None:
        while self._recent and self._recent[0][0] < self.clock() - WINDOW_S:
            self._recent.popleft()


@dataclass
class PlainProgress(Progress):
    """The same as lines, written when something is recorded and the last one is old."""

    _last: float = float("-inf")

    def start(self, counts: Sequence[StageCount]) -> None:
        """How far every stage is."""
        super().start(counts)
        self._write()

    def recorded(self, recorded: Recorded) -> None:
        """What one transaction wrote."""
        super().recorded(recorded)
        self._write()

    def _write(self) -> None:
        if self.clock() - self._last >= LINE_S:
            self._last = self.clock()
            print(self.line(), file=sys.stderr, flush=True)


@contextmanager
def live_table() -> Iterator[Progress]:
    """Show the progress of a run on stderr while the block lasts: a table on a terminal, lines elsewhere."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    if not console.is_terminal:
        yield PlainProgress()
        return
    progress = Progress()
    with Live(get_renderable=progress.table, console=console, refresh_per_second=REDRAWN_PER_S, transient=False):
        yield progress


def _duration(seconds: float) -> str:
    minutes = int(seconds // 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {int(seconds % 60)} s" if minutes else f"{seconds:.0f} s"
