"""`results.json`: everything a demo or a study found, in one typed and checked file.

Losses are nats per response token, accuracies and gate weights lie in 0..1, times are seconds. A list of gate
weights has one entry per specialist, in the order of `Results.specialists`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    model_validator,
)

from ultrafuser.files import read_json, write_text_atomically

SPECIALIST_PREFIX = "specialist:"  # the model `specialist:code` is the specialist `code` on its own
FUSED_PREFIX = "fused"  # `fused`, `fused:stage1`, `fused:stage2`

# A softmax in float32 may sum to a little over 1, so a weight may exceed it by as much.
Weight = Annotated[float, Field(ge=0.0, le=1.0 + 1e-4, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Score(_Frozen):
    """One model on one domain, with 95% intervals. Accuracy is None where no program can check the answers."""

    loss: FiniteFloat
    loss_low: FiniteFloat
    loss_high: FiniteFloat
    accuracy: Share | None = None
    accuracy_low: Share | None = None
    accuracy_high: Share | None = None
    n: NonNegativeInt  # records
    tokens: NonNegativeInt  # response tokens the loss is the mean of

    @model_validator(mode="after")
    def _check_interval(self) -> Score:
        given = [value is not None for value in (self.accuracy, self.accuracy_low, self.accuracy_high)]
        if any(given) and not all(given):
            raise ValueError("accuracy, accuracy_low and accuracy_high go together: give all three or none")
        return self


class HeatmapRow(_Frozen):
    """The mean gate weights of one sample (a row of Figure 6)."""

    domain: str
    weights: list[Weight]


class Heatmap(_Frozen):
    """Samples by specialists, as Figure 6."""

    specialists: Annotated[list[str], Field(min_length=1)]
    rows: list[HeatmapRow]

    @model_validator(mode="after")
    def _check_widths(self) -> Heatmap:
        for index, row in enumerate(self.rows):
            if len(row.weights) != len(self.specialists):
                raise ValueError(f"row {index} has {len(row.weights)} weights for {len(self.specialists)} specialists")
        return self


class AnswerToken(_Frozen):
    """One token of an answer. The weights are empty where the model has no gate."""

    text: str
    weights: list[Weight] = []


class Answer(_Frozen):
    """One answer, token by token, as Figures 8 and 9."""

    domain: str
    question: str
    expected: str
    correct: bool
    model: str
    tokens: list[AnswerToken]


class CurvePoint(_Frozen):
    """The training loss of one step, for each domain in its batch."""

    step: NonNegativeInt
    loss: dict[str, FiniteFloat]


class Results(_Frozen):
    """All of `results.json`.

    Attributes:
        name: Name of the run.
        seconds: Wall time of all of it.
        seed: The one seed everything random derives from.
        recipe: The resolved recipe.
        versions: Package to version.
        hardware: What it ran on.
        scores: Model to domain to score; the order is the order of the tables.
        gate_weights: Model to domain to specialist to mean weight (Table 6).
        heatmap: Mean gate weights of single samples (Figure 6).
        answers: Some answers with their gate weights (Figures 8 and 9).
        curves: Phase to its training losses (Figure 5).
        timings: Part of the run to seconds.
        notes: What a reader must know to judge the numbers, one sentence each.
    """

    name: str
    seconds: NonNegativeFloat
    seed: int
    recipe: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, str | int | float]
    scores: dict[str, dict[str, Score]] = {}
    gate_weights: dict[str, dict[str, dict[str, Weight]]] = {}
    heatmap: Heatmap | None = None
    answers: list[Answer] = []
    curves: dict[str, list[CurvePoint]] = {}
    timings: dict[str, NonNegativeFloat] = {}
    notes: list[str] = []

    @property
    def specialists(self) -> list[str]:
        """Names in the order of every list of weights: the heatmap's, else the gate weights', else the scores'."""
        if self.heatmap is not None:
            return self.heatmap.specialists
        weighted = [name for domains in self.gate_weights.values() for row in domains.values() for name in row]
        scored = [model.removeprefix(SPECIALIST_PREFIX) for model in self.scores if model.startswith(SPECIALIST_PREFIX)]
        return list(dict.fromkeys(weighted or scored))

    @property
    def domains(self) -> list[str]:
        """Every scored domain, in the order of first mention."""
        return list(dict.fromkeys(domain for scores in self.scores.values() for domain in scores))

    @model_validator(mode="after")
    def _check_answers(self) -> Results:
        for index, answer in enumerate(self.answers):
            widths = {len(token.weights) for token in answer.tokens} - {0}
            if widths - {len(self.specialists)}:
                raise ValueError(
                    f"answer {index} has tokens with {sorted(widths)} weights, but there are "
                    f"{len(self.specialists)} specialists: {', '.join(self.specialists) or 'none named'}"
                )
        return self


def write_results(results: Results, path: Path) -> None:
    """Write `results.json`; a reader sees the old file or the new one, never half of one.

    Raises:
        DataError: The file cannot be written.
    """
    write_text_atomically(results.model_dump_json(indent=2) + "\n", path)


def read_results(path: Path) -> Results:
    """Read `results.json`.

    Raises:
        DataError: The file is missing, or is no results file; names the first field that is wrong.
    """
    return read_json(path, Results, what="results file of this version")
