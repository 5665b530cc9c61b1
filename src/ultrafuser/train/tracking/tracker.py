"""Trackers by name: what they are asked to do, which there are, and which of them a recipe can have here.

TensorBoard writes to the run's own folder and is held to what `metrics.jsonl` is held to. A tracker that may talk to a
network is not: what it cannot take is said once and never stops training (`Guarded`).
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from ultrafuser.errors import ConfigError
from ultrafuser.train.tracking.phase import TrackedPhase

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """What every tracker can do."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Note the numbers of a step that is done; steps count from 1."""
        ...

    def close(self) -> None:
        """Finish writing."""
        ...


class TrackerKind(NamedTuple):
    """How a tracker is had.

    Attributes:
        module: Its package is installed if this can be found.
        extra: Of this package, that installs it.
        open: Begins a phase.
        check: Raises ConfigError where it could not begin (nobody is logged in, say).
        is_remote: May talk to a network, so its troubles must not stop training.
    """

    module: str
    extra: str
    open: Callable[[TrackedPhase], Tracker]
    check: Callable[[], None] = lambda: None
    is_remote: bool = True


def tracker_kinds() -> dict[str, TrackerKind]:
    """All trackers by the names that recipes use."""
    from ultrafuser.train.tracking.tensorboard_files import BoardFiles
    from ultrafuser.train.tracking.trackio_run import TrackioRun
    from ultrafuser.train.tracking.wandb_run import WandbRun, check_login

    return {
        "tensorboard": TrackerKind("tensorboard", "tracking", BoardFiles, is_remote=False),
        "trackio": TrackerKind("trackio", "trackio", TrackioRun),
        "wandb": TrackerKind("wandb", "wandb", WandbRun, check_login),
    }


def choose_trackers(names: Sequence[str] | None) -> tuple[str, ...]:
    """The trackers of a recipe; None: TensorBoard where it is installed.

    Raises:
        ConfigError: A named one is not installed, or could not begin; says what to do.
    """
    kinds = tracker_kinds()
    if names is None:
        return ("tensorboard",) if _is_installed(kinds["tensorboard"].module) else ()
    for name in dict.fromkeys(names):
        if not _is_installed(kinds[name].module):
            raise ConfigError(
                f"train.trackers names {name}, which is not installed: pip install 'ultrafuser[{kinds[name].extra}]', "
                "or leave it out (metrics.jsonl is written in any case)"
            )
        kinds[name].check()
    return tuple(dict.fromkeys(names))


def open_trackers(names: Sequence[str], phase: TrackedPhase) -> list[Tracker]:
    """Begin a phase in every tracker. Raises OSError where files of a local one cannot be written."""
    kinds = tracker_kinds()
    return [Guarded(name, kinds[name], phase) if kinds[name].is_remote else kinds[name].open(phase) for name in names]


class Guarded:
    """A tracker whose failure is told once, with what it was, and costs no training.

    Args:
        name: Of the tracker, for the message.
        kind: How it begins.
        phase: What it is to track.
    """

    def __init__(self, name: str, kind: TrackerKind, phase: TrackedPhase) -> None:
        self.name, self.folder = name, phase.folder
        self._tracker: Tracker | None = None
        self._guarded("begin", lambda: setattr(self, "_tracker", kind.open(phase)))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Note the numbers of a step, while the tracker works."""
        if (tracker := self._tracker) is not None:
            self._guarded(f"log step {step}", lambda: tracker.log(numbers, step))

    def close(self) -> None:
        """Finish writing, if the tracker still works."""
        if (tracker := self._tracker) is not None:
            self._guarded("finish", tracker.close)

    def _guarded(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        # Whatever a client of a service raises when a network or a service fails: the run is worth more than its curve.
        except Exception as error:
            self._tracker = None
            logger.warning(
                "%s could not %s (%s: %s): training goes on without it, and every number is in %s",
                self.name,
                what,
                type(error).__name__,
                " ".join(str(error).split()),
                self.folder / "metrics.jsonl",
            )


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
