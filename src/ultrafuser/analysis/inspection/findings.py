"""A finding: what one part of an inspection found, as one typed JSON file with a CSV file for each of its tables.

The page and the figures are made from these files alone, so a part may be inspected anew without the others.
Losses are nats per response token, weights, shares and probabilities lie in 0..1.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from ultrafuser.analysis.results import CurvePoint, Heatmap, Weight
from ultrafuser.files import read_json, write_text_atomically

Part = Literal["losses", "gate", "heatmap", "tokens", "question", "curves", "stability", "embeddings"]
PARTS: tuple[Part, ...] = get_args(Part)
ALL = "all"  # the row of a table that counts every domain together

Probability = Annotated[float, Field(ge=0.0, le=1.0 + 1e-4, allow_inf_nan=False)]
Value = str | int | FiniteFloat | None


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Table(_Frozen):
    """Numbers by rows and columns; the first column names the row. None: there is nothing to measure."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]*$")  # of its CSV file
    caption: str
    columns: list[str]
    rows: list[list[Value]]

    @model_validator(mode="after")
    def _check_widths(self) -> Table:
        if wrong := [row for row in self.rows if len(row) != len(self.columns)]:
            raise ValueError(f"table {self.name}: row {wrong[0]!r:.80} does not fit columns {self.columns}")
        return self


class Alternative(_Frozen):
    """A token that might have stood here."""

    text: str
    probability: Probability


class ViewedToken(_Frozen):
    """One token of an answer, and what each specialist would have written in its place.

    Attributes:
        text: What the token adds to the text before it.
        weights: The gate weights, one per specialist.
        probability: What the fused model gave this token.
        fused: The likeliest tokens of the fused model, likeliest first.
        alternatives: The same for each specialist alone, in order.
    """

    text: str
    weights: list[Weight]
    probability: Probability
    fused: list[Alternative]
    alternatives: list[list[Alternative]]


class TokenView(_Frozen):
    """One answer of the fused model, token by token (Figures 8 and 9).

    Attributes:
        domain: Of the question; "" where it was asked by hand.
        question: The last user message.
        expected: The answer on record; "" where there is none.
        tokens: The fused model's own greedy answer, without its end token.
        alone: What each specialist answers on its own, greedily.
    """

    domain: str
    question: str
    expected: str
    tokens: list[ViewedToken]
    alone: dict[str, str]


class Point(_Frozen):
    """One instruction on the map of Figure 3."""

    domain: str
    x: FiniteFloat
    y: FiniteFloat


class Finding(_Frozen):
    """What one part found.

    Attributes:
        part: Which part; names the JSON file.
        title: A heading.
        words: What is shown and how to read it.
        specialists: Names, in the order of every list of weights.
        domains: Names, in the order of the run.
        tables: Each also a CSV file.
        notes: What a reader must know to judge the numbers.
        heatmap: Mean weights of samples.
        curves: Phase to its training losses.
        validation: Phase to its validation losses.
        views: Answers token by token.
        points: Instructions on a map.
    """

    part: Part
    title: str
    words: str
    specialists: list[str] = []
    domains: list[str] = []
    tables: list[Table] = []
    notes: list[str] = []
    heatmap: Heatmap | None = None
    curves: dict[str, list[CurvePoint]] = {}
    validation: dict[str, list[CurvePoint]] = {}
    views: list[TokenView] = []
    points: list[Point] = []


def write_finding(finding: Finding, folder: Path) -> list[Path]:
    """Write `<part>.json`, and one CSV file for each table; returns their paths.

    Raises:
        DataError: A file cannot be written.
    """
    paths = [folder / f"{finding.part}.json", *(folder / f"{table.name}.csv" for table in finding.tables)]
    write_text_atomically(finding.model_dump_json(indent=1) + "\n", paths[0])
    for table, path in zip(finding.tables, paths[1:], strict=True):
        write_text_atomically(to_csv(table), path)
    return paths


def to_csv(table: Table) -> str:
    """A table as CSV with a header line; None becomes an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(table.rows)
    return text.getvalue()


def read_findings(folder: Path) -> list[Finding]:
    """Every finding in a folder, in the order of `PARTS`.

    Raises:
        DataError: A file is no finding of this version; names the file and the first field that is wrong.
    """
    paths = [folder / f"{part}.json" for part in PARTS]
    return [read_json(path, Finding, what="finding of this version, so delete it") for path in paths if path.is_file()]
