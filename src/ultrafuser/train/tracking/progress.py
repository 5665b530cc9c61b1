"""How far a phase is, for people: a live bar, or a line now and then."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class PhaseProgress:
    """A live bar with the time left; where there is no terminal, a line now and then.

    Args:
        name: Of the phase.
        total: Steps.
        start: Steps done before.
    """

    LINE_EVERY_S = 30.0

    def __init__(self, name: str, *, total: int, start: int) -> None:
        self.name, self.total, self.start = name, total, start
        self._began = self._last_line = time.monotonic()
        console = Console(file=sys.stderr)
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:<16}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._task = self._bar.add_task(name, total=total, completed=start, note="")
            self._bar.start()

    def advance(self, step: int, note: str) -> None:
        """One step is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
            return
        now = time.monotonic()
        if now - self._last_line >= self.LINE_EVERY_S or step == self.total:
            left = (now - self._began) / max(1, step - self.start) * (self.total - step)
            print(f"{self.name}: step {step}/{self.total}, {note}, {left:.0f} s left", file=sys.stderr, flush=True)
            self._last_line = now

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
