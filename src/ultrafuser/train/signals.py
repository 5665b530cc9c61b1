"""Ctrl-C asks training to stop, and training decides when: after the step, once it is saved.

Of several processes some may hear a signal, and some of them twice, since a launcher hands on what the terminal sent to
all: what they do about it they agree on after the step.
"""

from __future__ import annotations

import os
import signal
import time
from types import TracebackType
from typing import Any, Self

from ultrafuser.train.parallel.world import World

NOTICE = b"\nstopping: this step is finished and saved first (again to stop at once)\n"


class StopRequest:
    """While entered, the first SIGINT or SIGTERM sets `made`; a second one stops at once.

    Outside the main thread signals are somebody else's, and `made` stays False.

    Args:
        world: The processes that stop together; None: this one alone.
    """

    ECHO_S = 3.0  # in which a second signal to one of several processes is taken for the first one, handed on

    def __init__(self, world: World | None = None) -> None:
        self.made = False
        self._world = world if world is not None else World()
        self._at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        except ValueError:
            self._previous = {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether all stop now, because a process was asked to; all must ask after the same step."""
        if self._world.size == 1:
            return self.made
        stops = self._world.any(self.made)
        if stops and self._world.is_main:
            os.write(2, NOTICE)
        return stops

    def _handle(self, number: int, frame: object) -> None:
        del number, frame
        is_alone, now = self._world.size == 1, time.monotonic()
        if self.made and (is_alone or now - self._at > self.ECHO_S):
            raise KeyboardInterrupt
        if not self.made:
            self.made, self._at = True, now
            if is_alone:
                os.write(2, NOTICE)  # not print(): the signal may have come in the middle of one
