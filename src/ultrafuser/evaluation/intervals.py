"""Intervals: how far a measured accuracy, loss or difference may be from the true one.

Losses are weighted by tokens: the mean over all tokens of a domain is a ratio, sum(loss_r * tokens_r) / sum(tokens_r).
Tokens of one record depend on each other, so the bootstrap draws whole records and recomputes the ratio.

Shapes: R records, S resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ultrafuser.errors import DataError

NUM_RESAMPLES = 2000
_CELLS_AT_ONCE = 4_000_000  # bounds the counts [S, R] held at a time to 32 MB

Floats = npt.NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate and the ends of its interval."""

    value: float
    low: float
    high: float


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """The Wilson score interval of a share. Unlike the usual ± it stays within 0..1 and holds for few items.

    Raises:
        DataError: No items, or successes outside 0..n.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if n < 1 or not 0 <= successes <= n:
        raise DataError(f"{successes} successes of {n} items make no share: n must be at least 1 and successes 0..n")
    z = NormalDist().inv_cdf(0.5 + _checked(confidence) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the formula meets 0 and 1 exactly, but rounding does not.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(share, low, high)


def bootstrap_mean_interval(
    losses: Sequence[float],
    tokens: Sequence[int] | None = None,
    *,
    seed: int = 0,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """Percentile bootstrap over records of a token-weighted mean.

    One record gives an interval of no width: there is nothing to tell its spread from.

    Args:
        losses: Mean loss of each record, nats per token.
        tokens: Response tokens of each record; None weighs all records the same.
        seed: The same seed gives the same interval.
        confidence: Share of the resampled means within the interval.
        num_resamples: More make the ends steadier, not narrower.

    Raises:
        DataError: No records, lengths that differ, a loss that is not finite, or no tokens.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    values, weights = _checked_records(losses, tokens)
    means = _resampled_means(values * weights, weights, seed, num_resamples)
    return _percentiles(float(values @ weights / weights.sum()), means, confidence)


def paired_difference_interval(
    first: Sequence[float],
    second: Sequence[float],
    tokens: Sequence[int] | None = None,
    *,
    seed: int = 0,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """Bootstrap of mean(first) - mean(second), where both measured the same records.

    Hard records are hard for both, so the difference is known far better than either mean. Works for losses
    and, with `tokens=None`, for correctness (0 or 1) alike. An interval that leaves out 0 is a difference.

    Args:
        first: One value per record.
        second: The other model's value of the same record.
        tokens: Response tokens of each record; None weighs all records the same.
        seed: The same seed gives the same interval.
        confidence: Share of the resampled differences within the interval.
        num_resamples: More make the ends steadier, not narrower.

    Raises:
        DataError: As `bootstrap_mean_interval`, or the two did not measure equally many records.
    """
    if len(first) != len(second):
        raise DataError(f"a paired difference needs the same records, but there are {len(first)} and {len(second)}")
    differences = [one - other for one, other in zip(first, second, strict=True)]
    return bootstrap_mean_interval(differences, tokens, seed=seed, confidence=confidence, num_resamples=num_resamples)


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise DataError(f"confidence must lie between 0 and 1, not at {confidence}; 0.95 is usual")
    return confidence


def _checked_records(losses: Sequence[float], tokens: Sequence[int] | None) -> tuple[Floats, Floats]:
    values = np.asarray(losses, dtype=np.float64)
    weights = np.ones_like(values) if tokens is None else np.asarray(tokens, dtype=np.float64)
    if len(values) == 0:
        raise DataError("no records: an interval needs at least one")
    if len(values) != len(weights):
        raise DataError(f"{len(values)} losses but {len(weights)} token counts: give one of each per record")
    if not np.isfinite(values).all():
        raise DataError(f"the loss of record {int(np.argmin(np.isfinite(values)))} is not a finite number")
    if (weights <= 0).any():
        raise DataError(f"record {int(np.argmax(weights <= 0))} has no tokens: leave it out")
    return values, weights


def _resampled_means(totals: Floats, weights: Floats, seed: int, num_resamples: int) -> Floats:
    """Drawing R of R records with replacement is drawing how often each comes: a multinomial."""
    random = np.random.default_rng(seed)
    num_records = len(weights)
    chunk = max(1, _CELLS_AT_ONCE // num_records)
    means: list[Floats] = []
    for start in range(0, num_resamples, chunk):
        size = min(chunk, num_resamples - start)
        counts = random.multinomial(num_records, np.full(num_records, 1 / num_records), size=size)  # [S, R]
        means.append((counts @ totals) / (counts @ weights))
    return np.concatenate(means)


def _percentiles(value: float, means: Floats, confidence: float) -> Interval:
    tail = (1 - _checked(confidence)) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(value, float(low), float(high))
