"""`comparison.json`: one row per model with what it is worth and what it costs.

Losses are nats per response token, accuracies lie in 0..1, times are in seconds or milliseconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ultrafuser.files import read_json, write_text_atomically


class Row(BaseModel):
    """One model.

    A mark is {"loss", "loss_low", "loss_high", "accuracy", "accuracy_low", "accuracy_high", "n"}; what a model does not
    have is None (a selected answer has no loss; held-out records without a checker give no accuracy).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    what: str  # one line: how it was made
    marks: dict[str, dict[str, float | int | None]] = Field(default_factory=dict)
    correct: dict[str, list[bool]] = Field(default_factory=dict)  # item by item, for selection and paired differences
    parameters_trained: int | None = None
    parameters_served: int | None = None
    weights_bytes: int | None = None
    peak_bytes: int | None = None  # most held while it answered the timed questions: by tensors on a GPU, else by all
    train_s: float | None = None  # beyond the specialists, which all share
    ms_per_token: float | None = None  # greedy, one conversation at a time
    skipped: str | None = None  # why this row could not be made


class Comparison(BaseModel):
    """All rows, and what they rest on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    seed: int
    exam: str
    recipe: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, str | int | float]
    rows: list[Row]


def write_row(row: Row, path: Path) -> None:
    """Write a row, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(row.model_dump_json(indent=1), path)


def read_row(path: Path) -> Row:
    """Read a row back.

    Raises:
        DataError: The file is no row.
    """
    return read_json(path, Row, what="row of a comparison, so delete it")
