"""How much one key may ask: requests in the last minute, and requests at once."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ultrafuser.server.api_error import ApiError
from ultrafuser.server.settings import Limits

WINDOW_S = 60.0


class Rates:
    """Counts by key. A clock that jumps has no effect: time is monotonic.

    Args:
        limits: How many.
        clock: Seconds that only grow.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self.at_once, self.clock = limits.requests_per_minute, limits.requests_at_once, clock
        self._times: defaultdict[str, deque[float]] = defaultdict(deque)
        self._running: defaultdict[str, int] = defaultdict(int)

    @contextmanager
    def taking(self, key_id: str) -> Iterator[None]:
        """Count a request while it lasts.

        Raises:
            ApiError: Too many; 429, and when to come again.
        """
        if self.at_once and self._running[key_id] >= self.at_once:
            raise _too_many(f"this key may have {self.at_once} requests at once: wait for one to end", 1.0)
        self._count(key_id)
        self._running[key_id] += 1
        try:
            yield
        finally:
            self._running[key_id] -= 1

    def _count(self, key_id: str) -> None:
        if not self.per_minute:
            return
        times, now = self._times[key_id], self.clock()
        while times and times[0] <= now - WINDOW_S:
            times.popleft()
        if len(times) >= self.per_minute:
            raise _too_many(f"this key may ask {self.per_minute} times a minute", times[0] + WINDOW_S - now)
        times.append(now)


def _too_many(message: str, wait_s: float) -> ApiError:
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(max(1, math.ceil(wait_s)))})
