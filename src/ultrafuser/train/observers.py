"""Everyone who is told how a run goes: metrics file, progress, trackers, callbacks.

`Observers` is made once for a run, before any weight loads; `PhaseReport` is what the loop talks to in one phase.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ultrafuser.config.recipe import Recipe
from ultrafuser.errors import TrainingError
from ultrafuser.train.callbacks import NamedCallback, StopTraining, load_callbacks, name_callbacks
from ultrafuser.train.tracking.metrics import MetricsFile, named_numbers
from ultrafuser.train.tracking.progress import PhaseProgress
from ultrafuser.train.tracking.tracker import TrackedPhase, Tracker, choose_trackers, open_trackers

if TYPE_CHECKING:
    from ultrafuser.train.phase import Phase


@dataclass(frozen=True, slots=True)
class Observers:
    """Who is told of a run besides metrics file and progress.

    Attributes:
        run: Name of the recipe.
        config: The resolved recipe as plain values.
        trackers: Their names.
        callbacks: In the order in which they are called.
    """

    run: str = "run"
    config: Mapping[str, Any] = field(default_factory=dict)
    trackers: tuple[str, ...] = ()
    callbacks: tuple[NamedCallback, ...] = ()

    @classmethod
    def of(cls, recipe: Recipe, callbacks: Sequence[object] = ()) -> Self:
        """Those of a recipe, then callbacks given in Python.

        Raises:
            ConfigError: A tracker that is not installed or cannot begin, or a callback that is none.
        """
        return cls(
            run=recipe.name,
            config=recipe.model_dump(mode="json"),
            trackers=choose_trackers(recipe.train.trackers),
            callbacks=(*load_callbacks(recipe.train.callbacks), *name_callbacks(callbacks)),
        )


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
