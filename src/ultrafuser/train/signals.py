"""Ctrl-C asks training to stop, and training decides when: after the step, once it is saved."""

from __future__ import annotations

import os
import signal
from types import TracebackType
from typing import Any, Self

NOTICE = b"\nstopping: this step is finished and saved first (again to stop at once)\n"


class StopRequest:
    """While entered, the first SIGINT or SIGTERM sets `made`; a second one stops at once.

    Outside the main thread signals are somebody else's, and `made` stays False.
    """

    def __init__(self) -> None:
        self.made = False
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

    def _handle(self, number: int, frame: object) -> None:
        del number, frame
        if self.made:
            raise KeyboardInterrupt
        self.made = True
        os.write(2, NOTICE)  # not print(): the signal may have come in the middle of one
