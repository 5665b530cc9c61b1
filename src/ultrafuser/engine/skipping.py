"""Doing without specialists that say little: faster, and not exact.

A specialist whose recent weight is below a threshold does not run; the others share its weight. It catches up after a
while, reads all that it missed in one pass, and is weighed anew. At that token all specialists run, so what the fused
model says is known; what would have been said without it is worked out beside it, and the share of tokens where both
agree is reported: the price of the mode, measured while it runs.
"""

from __future__ import annotations

from collections.abc import Sequence

from ultrafuser.engine.choice import Choice

LONGEST_LAG = 16  # tokens that a specialist may miss before it catches up
_KEEP = 0.7  # of the running average of a weight, at every token


class Absences:
    """Which specialists one choice does without.

    Args:
        below: Weight under which a specialist is left out; 0 keeps all.
    """

    def __init__(self, below: float) -> None:
        self.below = below
        self._averages: list[float] = []

    def observe(self, weights: Sequence[float], absent: set[int]) -> None:
        """Weights of the latest token; those of specialists that did not run are not known."""
        if not self._averages:
            self._averages = list(weights)
        for view, weight in enumerate(weights):
            if view not in absent:
                self._averages[view] = _KEEP * self._averages[view] + (1 - _KEEP) * weight

    def of(self, choice: Choice) -> tuple[set[int], set[int]]:
        """Who is left out of the next token, and who was and catches up in it."""
        if not self.below or choice.weights is not None or not self._averages:
            return set(), set()
        heaviest = max(range(len(self._averages)), key=self._averages.__getitem__)
        light = {
            view
            for view, average in enumerate(self._averages)
            if average < self.below and view != heaviest and choice.active[view]
        }
        absent = {view for view in light if len(choice.pending(view)) <= LONGEST_LAG}
        lagging = {view for view in range(len(self._averages)) if choice.active[view] and len(choice.pending(view)) > 1}
        if lagging - absent:  # one is due: all catch up together, so that this token is exact
            return set(), lagging
        return absent, set()
