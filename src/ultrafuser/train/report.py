"""What the loop talks to in one phase: it tells metrics file, progress, trackers and callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ultrafuser.errors import TrainingError
from ultrafuser.train.callbacks import StopTraining
from ultrafuser.train.phase import Phase
from ultrafuser.train.tracking.metrics import MetricsFile, named_numbers
from ultrafuser.train.tracking.phase import TrackedPhase
from ultrafuser.train.tracking.progress import PhaseProgress
from ultrafuser.train.tracking.tracker import Tracker, open_trackers


class PhaseReport:
    """Tells everyone of one phase. To be entered; leaving it closes what it opened.

    Args:
        phase: What is trained.
        step: Steps done before.

    Attributes:
        wish: Who asked to stop, and why, once a callback has: training saves this step and stops.

    Raises:
        TrainingError: The disk is full or refuses.
    """

    def __init__(self, phase: Phase, step: int) -> None:
        self.phase, self.folder = phase, phase.folder
        self.wish: tuple[str, str] | None = None
        observers = phase.observers
        self._callbacks = observers.callbacks
        self._step = step
        tracked = TrackedPhase(observers.run, phase.name, phase.folder, step, observers.config)
        self._trackers: list[Tracker] = []
        try:
            self._metrics = MetricsFile(self.folder / "metrics.jsonl", resume_step=step)
            self._trackers = open_trackers(observers.trackers, tracked)
        except OSError as error:
            raise self._refused(error) from error
        self._progress = PhaseProgress(phase.name, total=phase.stage.steps, start=step)

    def __enter__(self) -> Self:
        try:
            self._tell("on_phase_begin", self.phase, self._step)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def note(self, values: Mapping[str, Any]) -> None:
        """One step is done: its line of metrics."""
        self._step = values["step"] + 1
        try:
            self._metrics.write(values)
            numbers = named_numbers(values)
            for tracker in self._trackers:
                tracker.log(numbers, self._step)
        except OSError as error:
            raise self._refused(error) from error
        self._progress.advance(self._step, f"loss {values['loss']:.3f}")
        self._tell("on_step", values)
        if "validation" in values:
            self._tell("on_validation", values["validation"])

    def saved(self, folder: Path) -> None:
        """A checkpoint of the steps done is on the disk; after the last step the phase is at its end."""
        self._tell("on_checkpoint", self._step, folder)
        if self._step == self.phase.stage.steps:
            self._tell("on_phase_end", self.phase)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.close()
        refused: OSError | None = None
        for close in (*(tracker.close for tracker in self._trackers), self._metrics.close):
            try:
                close()
            except OSError as problem:
                refused = problem
        if refused is not None and error is None:  # else what went wrong first is what to tell
            raise self._refused(refused) from refused

    def stopped(self) -> TrainingError:
        """The error that ends training as a callback asked for."""
        assert self.wish is not None
        name, reason = self.wish
        return TrainingError(
            f"{self.phase.name} was stopped after step {self._step} of {self.phase.stage.steps} by the callback {name}"
            f"{f': {reason}' if reason else ''}. The same command goes on from there"
        )

    def _tell(self, hook: str, *arguments: object) -> None:
        for callback in self._callbacks:
            try:
                callback.call(hook, *arguments)
            except StopTraining as wish:
                self.wish = self.wish or (callback.name, str(wish))

    def _refused(self, error: OSError) -> TrainingError:
        return TrainingError(
            f"cannot write metrics to {self.folder}: {error.strerror or error}. Make room and start again: training "
            "goes on from the newest whole checkpoint"
        )
