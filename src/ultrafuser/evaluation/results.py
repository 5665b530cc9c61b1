"""`results.json` of an evaluation: every item, every aggregate with its interval, every paired difference, every cost.

Metrics lie in 0..1 unless their name says otherwise (`score` of MT-Bench: 1..10); times are seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import comb
from pathlib import Path

from pydantic import BaseModel, ConfigDict, FiniteFloat, NonNegativeFloat, NonNegativeInt

from ultrafuser.errors import DataError
from ultrafuser.evaluation.intervals import (
    Interval,
    bootstrap_mean_interval,
    paired_difference_interval,
    wilson_interval,
)
from ultrafuser.files import read_json, write_text_atomically


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ItemResult(_Frozen):
    """One question: what a model answered and what that was worth.

    Attributes:
        id: The same for every model.
        prompt_hash: Hash of the conversation, templates not applied; items of another hash are another question.
        values: Metric to value. A metric that could not be measured (a judge's reply that cannot be read) is absent.
        weights: Metric to weight in the mean; 1 where absent.
        outcome: "right", "wrong", "unparsed", "timeout", or what the sandbox or the judge said.
        extracted: The piece that was taken for the answer.
        gold: The right answer, where there is one to show.
        responses: All that the model wrote; empty for scored options.
    """

    model: str
    task: str
    id: str
    prompt_hash: str
    values: dict[str, FiniteFloat]
    weights: dict[str, NonNegativeInt] = {}
    outcome: str = ""
    extracted: str | None = None
    gold: str | None = None
    responses: list[str] = []


class Estimate(_Frozen):
    """A mean over `n` items with its 95% interval."""

    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    n: NonNegativeInt


class TaskScore(_Frozen):
    """One model on one task.

    Attributes:
        metrics: Estimates by name.
        outcomes: How often each outcome was met.
        num_cut: Answers that ended because they were too long.
        tokens: Tokens written, or scored.
        seconds: Time the model took for them, over all runs of this evaluation.
        tokens_per_s: One by the other; None if nothing was answered.
        peak_memory_bytes: Most that was held while these answers were made: by tensors on a GPU, else by the process.
    """

    model: str
    task: str
    metrics: dict[str, Estimate]
    outcomes: dict[str, NonNegativeInt] = {}
    num_items: NonNegativeInt
    num_cut: NonNegativeInt = 0
    tokens: NonNegativeInt = 0
    seconds: NonNegativeFloat = 0.0
    tokens_per_s: NonNegativeFloat | None = None
    peak_memory_bytes: NonNegativeInt = 0


class Difference(_Frozen):
    """`first` minus `second` on the same items. An interval that leaves out 0 is a difference.

    Attributes:
        p_value: Exact McNemar test, where every value is 0 or 1.
    """

    task: str
    metric: str
    first: str
    second: str
    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    n: NonNegativeInt
    p_value: FiniteFloat | None = None


class TaskSource(_Frozen):
    """What a task read: the place, the SHA-256 of its documents, and how many questions."""

    place: str
    digest: str
    num_questions: NonNegativeInt
    headline: str


class ModelSource(_Frozen):
    """A model under test: where it came from and the hash of its content (of address and name, for an endpoint)."""

    place: str
    digest: str


class EvaluationResults(_Frozen):
    """All of `results.json`.

    Attributes:
        models: In the order of the tables.
        tasks: In the order of the tables.
        options: What the evaluation was asked to do.
        versions: Package to version.
        hardware: What it ran on.
        scores: One per model and task.
        differences: Every pair of models on every task, on its headline metric.
        items: Every item.
        notes: What a reader must know to judge the numbers, one sentence each.
    """

    models: dict[str, ModelSource]
    tasks: dict[str, TaskSource]
    options: dict[str, str | int | float | None] = {}
    versions: dict[str, str] = {}
    hardware: dict[str, str | int | float] = {}
    scores: list[TaskScore] = []
    differences: list[Difference] = []
    items: list[ItemResult] = []
    notes: list[str] = []

    def score(self, model: str, task: str) -> TaskScore | None:
        """The score of one model on one task; None if it has not taken it."""
        return next((score for score in self.scores if (score.model, score.task) == (model, task)), None)


def aggregate(items: Sequence[ItemResult]) -> dict[str, Estimate]:
    """Mean and interval of every metric of some items, over those that have it.

    Shares of items that are right or wrong get a Wilson interval, all else a bootstrap over items.
    """
    estimates = {}
    for metric in dict.fromkeys(metric for item in items for metric in item.values):
        having = [item for item in items if metric in item.values]
        values = [item.values[metric] for item in having]
        weights = [item.weights.get(metric, 1) for item in having]
        if set(values) <= {0.0, 1.0} and set(weights) == {1}:
            interval = wilson_interval(int(sum(values)), len(values))
        else:
            interval = bootstrap_mean_interval(values, weights)
        estimates[metric] = _estimate(interval, len(values))
    return estimates


def compare(items: Iterable[ItemResult], models: Sequence[str], headlines: Mapping[str, str]) -> list[Difference]:
    """Differences of every pair of models on every task, over the items that both have answered.

    Raises:
        DataError: Two models were asked different questions under the same id.
    """
    by_place: dict[tuple[str, str], dict[str, ItemResult]] = {}
    for item in items:
        by_place.setdefault((item.task, item.model), {})[item.id] = item
    differences = []
    for task, metric in headlines.items():
        for number, first in enumerate(models):
            for second in models[number + 1 :]:
                one, other = by_place.get((task, first), {}), by_place.get((task, second), {})
                shared = [(one[id], other[id]) for id in one if id in other]
                pairs = [(a, b) for a, b in shared if metric in a.values and metric in b.values]
                if pairs:
                    differences.append(_difference(task, metric, pairs))
    return differences


def _difference(task: str, metric: str, pairs: Sequence[tuple[ItemResult, ItemResult]]) -> Difference:
    for a, b in pairs:
        if a.prompt_hash != b.prompt_hash:
            raise DataError(f"{task}, item {a.id}: {a.model} and {b.model} were asked different questions")
    first = [a.values[metric] for a, _ in pairs]
    second = [b.values[metric] for _, b in pairs]
    weights = [a.weights.get(metric, 1) for a, _ in pairs]
    interval = paired_difference_interval(first, second, weights)
    return Difference(
        task=task,
        metric=metric,
        first=pairs[0][0].model,
        second=pairs[0][1].model,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        n=len(pairs),
        p_value=mcnemar(first, second) if set(first) | set(second) <= {0.0, 1.0} and set(weights) == {1} else None,
    )


def mcnemar(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided exact p-value that two models are right equally often, from the items on which they differ."""
    better = sum(a > b for a, b in zip(first, second, strict=True))
    worse = sum(a < b for a, b in zip(first, second, strict=True))
    n, fewer = better + worse, min(better, worse)
    return min(1.0, 2 * sum(comb(n, k) for k in range(fewer + 1)) * 0.5**n)


def write_results(results: EvaluationResults, path: Path) -> None:
    """Write `results.json`.

    Raises:
        DataError: The file cannot be written.
    """
    write_text_atomically(results.model_dump_json(indent=1) + "\n", path)


def read_results(path: Path) -> EvaluationResults:
    """Read `results.json`.

    Raises:
        DataError: The file is missing, or is no results file; names the first field that is wrong.
    """
    return read_json(path, EvaluationResults, what="evaluation of this version")


def _estimate(interval: Interval, n: int) -> Estimate:
    return Estimate(value=interval.value, low=interval.low, high=interval.high, n=n)
