"""Intervals against published values and against plain arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from ultrafuser.errors import DataError
from ultrafuser.evaluation.intervals import bootstrap_mean_interval, paired_difference_interval, wilson_interval


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe 1998, "Two-sided confidence intervals for the single proportion", Table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (8, 10, 0.4902, 0.9433),
    ],
)
def test_wilson_gives_the_published_values(successes: int, n: int, low: float, high: float) -> None:
    """To four decimals."""
    interval = wilson_interval(successes, n)

    assert interval.value == successes / n
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


def test_wilson_is_symmetric_and_widens_with_confidence() -> None:
    """Right and wrong may change places; more confidence is a wider interval."""
    right, wrong, sure = wilson_interval(7, 30), wilson_interval(23, 30), wilson_interval(7, 30, confidence=0.99)

    assert right.low == pytest.approx(1 - wrong.high)
    assert sure.low < right.low < right.high < sure.high
    assert wilson_interval(30, 30).high == 1.0


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_share(successes: int, n: int) -> None:
    """No items, or more right ones than items."""
    with pytest.raises(DataError, match="make no share"):
        wilson_interval(successes, n)


def test_the_mean_is_over_tokens_not_records() -> None:
    """Ten tokens at 1 and thirty at 3 are 2.5 nats per token."""
    assert bootstrap_mean_interval([1.0, 3.0], [10, 30]).value == pytest.approx(2.5)
    assert bootstrap_mean_interval([1.0, 3.0]).value == pytest.approx(2.0)


def test_equal_weights_give_the_textbook_interval() -> None:
    """For many records of one length the bootstrap agrees with mean ± 1.96 standard errors."""
    losses = np.random.default_rng(0).normal(2.0, 0.5, size=800)
    half = 1.96 * losses.std() / np.sqrt(len(losses))

    interval = bootstrap_mean_interval(losses.tolist(), [7] * len(losses), seed=3)

    assert interval.low == pytest.approx(losses.mean() - half, abs=half / 10)
    assert interval.high == pytest.approx(losses.mean() + half, abs=half / 10)


def test_the_ratio_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Losses that hang on lengths, 200 repetitions: the 95% interval holds the true ratio in about 95%."""
    random = np.random.default_rng(5)
    truth = (10 * 1.0 + 50 * 2.0) / (10 + 50)
    covered = 0
    for seed in range(200):
        tokens = random.choice([10, 50], size=120)
        losses = np.where(tokens == 10, 1.0, 2.0) + random.normal(0, 0.3, size=120)
        interval = bootstrap_mean_interval(losses.tolist(), tokens.tolist(), seed=seed, num_resamples=400)
        covered += interval.low <= truth <= interval.high

    assert 0.90 <= covered / 200 <= 0.985


def test_the_same_seed_gives_the_same_interval() -> None:
    """And another seed another one."""
    losses = np.random.default_rng(2).normal(size=50).tolist()

    first = bootstrap_mean_interval(losses, seed=1)

    assert bootstrap_mean_interval(losses, seed=1) == first
    assert bootstrap_mean_interval(losses, seed=2) != first


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by drawing in chunks; the draws are the same."""
    losses = np.random.default_rng(2).normal(size=50).tolist()
    whole = bootstrap_mean_interval(losses)

    monkeypatch.setattr("ultrafuser.evaluation.intervals._CELLS_AT_ONCE", 500)

    assert bootstrap_mean_interval(losses) == pytest.approx(whole)


def test_pairing_sees_a_difference_that_the_means_hide() -> None:
    """Records differ by far more than the models do, but every record is a little worse."""
    hard = np.random.default_rng(1).uniform(0.0, 5.0, size=100)
    first, second = (hard + 0.05).tolist(), hard.tolist()

    difference = paired_difference_interval(first, second, [4] * 100)

    assert difference == pytest.approx((0.05, 0.05, 0.05))
    assert bootstrap_mean_interval(first).low < bootstrap_mean_interval(second).high


@pytest.mark.parametrize(
    ("losses", "tokens", "message"),
    [
        ([], [], "no records"),
        ([1.0], [1, 2], "1 losses but 2 token counts"),
        ([1.0, float("nan")], [1, 1], "record 1 is not a finite number"),
        ([1.0, 2.0], [1, 0], "record 1 has no tokens"),
    ],
)
def test_records_that_cannot_be_averaged_are_named(losses: list[float], tokens: list[int], message: str) -> None:
    """The error says which record."""
    with pytest.raises(DataError, match=message):
        bootstrap_mean_interval(losses, tokens)


def test_pairs_must_be_pairs_and_confidence_a_share() -> None:
    """Both are mistakes of the caller that would give a wrong interval."""
    with pytest.raises(DataError, match="1 and 2"):
        paired_difference_interval([1.0], [1.0, 2.0])
    with pytest.raises(DataError, match="not at 95"):
        bootstrap_mean_interval([1.0], confidence=95.0)
