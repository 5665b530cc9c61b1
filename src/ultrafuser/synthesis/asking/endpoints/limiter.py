"""How much may be asked at once: concurrency that finds its own height, and requests and tokens per minute.

Concurrency grows by addition and halves on overload (AIMD, as TCP does): an endpoint's limit is whatever it refuses.
Time is given, never read, in seconds from anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LONGEST_REST_S = 60.0
FIRST_REST_S = 0.25


@dataclass(frozen=True, slots=True)
class Place:
    """One request under way; `number` orders their beginnings."""

    number: int
    began: float


@dataclass
class Concurrency:
    """How many requests at once, and when none.

    It starts at the ceiling, and halves when a request is refused, once for all that began before that. It grows by a
    thirty-second of the ceiling when as many requests as it allows were answered since the last refusal. After a
    refusal it rests: as long as the endpoint asks, else for a quarter of a second, doubling while nothing is answered.

    Attributes:
        ceiling: Never more.
    """

    ceiling: int
    limit: int = field(init=False)
    num_under_way: int = field(default=0, init=False)
    rests_until: float = field(default=0.0, init=False)
    _next: int = field(default=0, init=False)
    _floor: int = field(default=0, init=False)  # requests from this number on began after the last halving
    _streak: int = field(default=0, init=False)
    _num_rests: int = field(default=0, init=False)  # in a row

    def __post_init__(self) -> None:
        self.limit = self.ceiling

    def wait_s(self, now: float) -> float:
        """How long until a request may begin; infinite: until another ends."""
        # While nothing has been answered since the last rest, one request finds out whether that has changed.
        allowed = 1 if self._num_rests > 1 else self.limit
        return float("inf") if self.num_under_way >= allowed else max(0.0, self.rests_until - now)

    def begin(self, now: float) -> Place:
        """A request is sent."""
        self.num_under_way += 1
        self._next += 1
        return Place(self._next - 1, now)

    def answered(self, _place: Place) -> None:
        """It was answered."""
        self.num_under_way -= 1
        self._num_rests = 0
        self._streak += 1
        if self._streak >= self.limit:
            self._streak = 0
            self.limit = min(self.ceiling, self.limit + max(1, self.ceiling // 32))

    def ended(self, _place: Place) -> None:
        """It ended in a way that tells nothing about load."""
        self.num_under_way -= 1

    def refused(self, place: Place, now: float, retry_after_s: float | None = None, *, for_load: bool = True) -> None:
        """It was refused for load, or there is no endpoint: rest, and in the first case ask less at once."""
        self.num_under_way -= 1
        self._streak = 0
        if place.number >= self._floor:
            self._floor = self._next
            self.limit = max(1, self.limit // 2) if for_load else self.limit
            self._num_rests += 1
            rest_s = min(LONGEST_REST_S, FIRST_REST_S * 2 ** min(self._num_rests - 1, 20))
            self.rests_until = max(self.rests_until, now + rest_s if retry_after_s is None else now)
        if retry_after_s is not None:
            self.rests_until = max(self.rests_until, now + retry_after_s)


@dataclass
class Bucket:
    """A quantity per minute: full at the start, filled at its rate, with room for ten seconds.

    Ten seconds, and not sixty: providers look at parts of a minute, too. What is taken is put back as far as it was
    not used, and what was used beyond it is owed.
    """

    per_minute: float | None
    _level: float = field(default=0.0, init=False)
    _seen: float | None = field(default=None, init=False)

    def wait_s(self, amount: float, now: float) -> float:
        """How long until so much may be taken; more than there is room for: until it is full."""
        if self.per_minute is None:
            return 0.0
        self._fill(now)
        missing = min(amount, self._room) - self._level
        return max(0.0, missing * 60.0 / self.per_minute)

    def take(self, amount: float, now: float) -> None:
        """Take it; negative: put it back."""
        if self.per_minute is not None:
            self._fill(now)
            self._level = min(self._room, self._level - amount)

    @property
    def _room(self) -> float:
        return max(1.0, (self.per_minute or 0.0) / 6.0)

    def _fill(self, now: float) -> None:
        assert self.per_minute is not None
        if self._seen is None:
            self._level = self._room
        else:
            self._level = min(self._room, self._level + max(0.0, now - self._seen) * self.per_minute / 60.0)
        self._seen = now if self._seen is None else max(now, self._seen)
