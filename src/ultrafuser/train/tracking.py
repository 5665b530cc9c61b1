"""What training reports: one JSON line a step, TensorBoard where it is installed, a progress bar for people."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ultrafuser.errors import TrainingError


class Tracker:
    """Reports every step of a phase in all three ways.

    Args:
        name: Of the phase.
        folder: Takes `metrics.jsonl` and `tensorboard/`.
        start: Steps done before.
        total: Steps of the phase.

    Raises:
        TrainingError: The disk is full or refuses.
    """

    def __init__(self, name: str, folder: Path, start: int, total: int) -> None:
        self.folder = folder
        try:
            self._metrics = MetricsFile(folder / "metrics.jsonl", resume_step=start)
            self._board = open_board(folder / "tensorboard", resume_step=start)
        except OSError as error:
            raise self._refused(error) from error
        self._progress = PhaseProgress(name, total=total, start=start)

    def note(self, values: Mapping[str, Any]) -> None:
        """One step is done: its line of metrics."""
        step = values["step"] + 1
        try:
            self._metrics.write(values)
            if self._board is not None:
                log_to_board(self._board, values, step)
        except OSError as error:
            raise self._refused(error) from error
        self._progress.advance(step, f"loss {values['loss']:.3f}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.close()
        try:
            self._metrics.close()
            if self._board is not None:
                self._board.close()
        except OSError as refused:
            if error is None:  # else what went wrong first is what to tell
                raise self._refused(refused) from refused

    def _refused(self, error: OSError) -> TrainingError:
        return TrainingError(
            f"cannot write metrics to {self.folder}: {error.strerror or error}. Make room and start again: training "
            "goes on from the newest whole checkpoint"
        )


class MetricsFile:
    """`metrics.jsonl`: one line a step, appended and flushed; on resume, lines of repeated steps are cut.

    Args:
        path: The file.
        resume_step: The step that training goes on with; later lines are dropped.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(path) if line["step"] < resume_step] if path.exists() else []
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of a metrics file; a line torn by a crash can only be the last and is left out."""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


class Board(Protocol):
    """The part of TensorBoard's writer that is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Note one number."""
        ...

    def close(self) -> None:
        """Finish writing."""
        ...


def open_board(folder: Path, *, resume_step: int = 0) -> Board | None:
    """A TensorBoard writer, or None where the extra `tracking` is not installed; steps done again replace the old."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    writer: Board = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)
    return writer


def log_to_board(board: Board, values: Mapping[str, Any], step: int, prefix: str = "") -> None:
    """Every number of a metrics line under its path, such as `loss_per_domain/code`."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            log_to_board(board, value, step, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key != "step":
            board.add_scalar(prefix + key, float(value), step)


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
