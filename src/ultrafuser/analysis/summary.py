"""Reading the scores: which model is best where, and the sentences that say so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ultrafuser.analysis.results import FUSED_PREFIX, SPECIALIST_PREFIX, Results, Score


class Best(NamedTuple):
    """The best models of a domain; several where they tie."""

    loss: frozenset[str]
    accuracy: frozenset[str]


def best_models(results: Results, domain: str) -> Best:
    """Who has the lowest loss and who the highest accuracy on a domain."""
    scores = {model: domains[domain] for model, domains in results.scores.items() if domain in domains}
    losses = {model: score.loss for model, score in scores.items()}
    accuracies = {model: score.accuracy for model, score in scores.items() if score.accuracy is not None}
    return Best(
        frozenset(model for model, loss in losses.items() if loss == min(losses.values())),
        frozenset(model for model, accuracy in accuracies.items() if accuracy == max(accuracies.values())),
    )


def headline(results: Results) -> list[str]:
    """What came out, in a few sentences: the last fused model against the best specialist of each domain.

    Without a fused model or without specialists there is nothing to say, and the list is empty.
    """
    fused = [model for model in results.scores if model.startswith(FUSED_PREFIX)]
    specialists = [model for model in results.scores if model.startswith(SPECIALIST_PREFIX)]
    if not fused or not specialists:
        return []
    model = fused[-1]
    return [
        *_compare(
            results,
            model,
            specialists,
            claim="a loss below the best specialist's",
            merit=lambda score: -score.loss,
            ties_count=False,
        ),
        *_compare(
            results,
            model,
            specialists,
            claim="an accuracy not below the best specialist's",
            merit=lambda score: score.accuracy,
            ties_count=True,
        ),
    ]


def percent(share: float) -> str:
    """A share of 0..1 as a whole percentage, with a decimal where it would hide something."""
    return f"{100 * share:.1f}%" if 0.99 < share < 1 or 0 < share < 0.01 else f"{100 * share:.0f}%"


def accuracy_interval(score: Score) -> str:
    """The interval of the accuracy as `[55, 69]`, in percent; empty where there is no accuracy."""
    if score.accuracy_low is None or score.accuracy_high is None:
        return ""
    return f"[{100 * score.accuracy_low:.0f}, {100 * score.accuracy_high:.0f}]"


def loss_interval(score: Score) -> str:
    """The interval of the loss as `[0.612, 0.660]`."""
    return f"[{score.loss_low:.3f}, {score.loss_high:.3f}]"


def duration(seconds: int | float) -> str:
    """Seconds as people say them: `3 min 56 s`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _compare(
    results: Results,
    model: str,
    rivals: Sequence[str],
    *,
    claim: str,
    merit: Callable[[Score], float | None],
    ties_count: bool,
) -> list[str]:
    """In how many domains the model beats the best rival, where `merit` is higher for the better."""
    won: list[str] = []
    lost: list[str] = []
    for domain, score in results.scores[model].items():
        own = merit(score)
        theirs = [merit(results.scores[rival][domain]) for rival in rivals if domain in results.scores[rival]]
        known = [value for value in theirs if value is not None]
        if own is None or not known:
            continue
        (won if own > max(known) or (ties_count and own == max(known)) else lost).append(domain)
    if not won and not lost:
        return []
    exceptions = f"; not in {', '.join(lost)}" if lost and won else ""
    return [f"{model} has {claim} in {len(won)} of {len(won) + len(lost)} domains{exceptions}."]
