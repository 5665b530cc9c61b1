"""How far one draft goes, decided token by token from how sure its writer was.

Whoever writes a draft is surer of some tokens than of others: the margin by which a token leads the next best says how
likely the fused model is to agree. How likely is learnt while drafting, margin by margin. A draft then goes on as long
as a further token is worth more than it costs, and of what was written only that part is read by all which pays.

The margin counts in logits and, where tokens are drawn, with the noise of their position: the same noise decides for
the fused model, so a difference between the two models that is smaller than the margin changes nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

_EDGES = (0.25, 0.5, 1.0, 1.5, 2.5, 4.0)  # nats, between the groups of margins
_FIRST = (0.5, 0.6, 0.75, 0.9, 0.95, 0.98, 0.99)  # shares that agree in each group as long as little is known
_FIRST_WEIGHT = 4.0  # guesses that these stand for
_KEEP = 0.99  # of a group's past at every guess in it


class Certainty:
    """Shares of guesses that agree, by the margin with which they were made."""

    def __init__(self) -> None:
        self._agreed = [_FIRST_WEIGHT * share for share in _FIRST]
        self._tried = [_FIRST_WEIGHT] * len(_FIRST)

    def chance(self, margin: float) -> float:
        """How likely a guess of this margin is right when all before it are."""
        group = bisect_right(_EDGES, margin)
        return self._agreed[group] / self._tried[group]

    def observe(self, margin: float, agreed: bool) -> None:
        """A guess of this margin was compared."""
        group = bisect_right(_EDGES, margin)
        self._agreed[group] = self._agreed[group] * _KEEP + agreed
        self._tried[group] = self._tried[group] * _KEEP + 1


class Course:
    """How far the draft of one block goes.

    Args:
        certainty: What is known of such guesses.
        rate: Share of guesses that agree, for a token that is not written yet.
        worth: Seconds that a token saves when it need not be decoded otherwise.
        feed: Seconds to write one.
        of_pass: Seconds of the pass that reads so many guesses.
    """

    def __init__(
        self, certainty: Certainty, *, rate: float, worth: float, feed: float, of_pass: Callable[[int], float]
    ) -> None:
        self.certainty, self.rate, self.worth, self.feed, self.of_pass = certainty, rate, worth, feed, of_pass
        self.margins: list[Sequence[float]] = []  # of every token, those of all choices
        self.reached: list[float] = []  # how likely each token is kept, the mean of all choices
        self._alive: list[float] = []

    def goes_on(self, margins: Sequence[float]) -> bool:
        """A token of every choice was written with these margins: whether another should be."""
        self.margins.append(margins)
        alive = self._alive or [1.0] * len(margins)
        self._alive = [before * self.certainty.chance(m) for before, m in zip(alive, margins, strict=True)]
        self.reached.append(sum(self._alive) / len(margins))
        written = len(self.reached)
        row = max(self.of_pass(written + 1) - self.of_pass(written), 0.0)
        return self.reached[-1] * self.rate * self.worth > self.feed + row

    def pays(self) -> int:
        """How many of the written tokens all should read: the number that saves most."""
        saved = [self.worth * sum(self.reached[:n]) - self.of_pass(n) for n in range(len(self.reached) + 1)]
        return max(range(len(saved)), key=saved.__getitem__)
