"""Length-controlled win rate: what the win rate would be if both answers were of one length.

A logistic regression explains the judge's preferences by the difference in length and by the model; predicted at no
difference, it tells the model's part alone.

Source: Dubois et al. 2024 (arXiv 2404.04475), Equation 2, without the term for the instruction's difficulty, whose
values were fitted on other models' answers: `length_controlled_minimal` of alpaca-eval 0.6.6. That one adds a penalty
chosen by cross-validation, which decides nothing on 805 items and may pull the win rate of a few dozen to 50%.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ultrafuser.evaluation.results import Estimate, ItemResult

NUM_RESAMPLES = 500
RIDGE = 1e-4  # keeps the coefficients finite where the preferences can be told apart completely
STEPS = 50

Floats = npt.NDArray[np.float64]


def length_controlled(items: Sequence[ItemResult], *, seed: int = 0) -> Estimate:
    """The length-controlled win rate of some items with `win_rate` and `length_delta`, with a bootstrap over items."""
    pairs = [(i.values["win_rate"], i.values["length_delta"]) for i in items if "win_rate" in i.values]
    wins, deltas = (np.asarray(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    random = np.random.default_rng(seed)
    draws = [random.integers(len(wins), size=len(wins)) for _ in range(NUM_RESAMPLES)]
    low, high = np.quantile([win_rate_at_no_difference(wins[d], deltas[d]) for d in draws], [0.025, 0.975])
    value = win_rate_at_no_difference(wins, deltas)
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value), n=len(wins))


def win_rate_at_no_difference(wins: Floats, deltas: Floats) -> float:
    """The regression's prediction at equal lengths.

    Args:
        wins: Preference of each item, 0 (the reference) to 1 (the model).
        deltas: Characters of the model's answer minus the reference's.
    """
    spread = deltas.std(ddof=1) if len(deltas) > 1 else 0.0  # as alpaca-eval has it
    scaled = np.tanh(deltas / spread) if spread > 0 else np.zeros_like(deltas)
    design = np.stack([np.ones_like(scaled), scaled], axis=1)
    weights = np.zeros(2)
    for _ in range(STEPS):
        predicted = 1 / (1 + np.exp(-design @ weights))
        gradient = design.T @ (wins - predicted) - RIDGE * weights
        curvature = (design * (predicted * (1 - predicted))[:, None]).T @ design + RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        weights += np.clip(step, -2.0, 2.0)
        if np.abs(step).max() < 1e-9:
            break
    return float(1 / (1 + np.exp(-weights[0])))
