"""`metrics.jsonl`: one JSON line a step, and its numbers by name as trackers take them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class MetricsFile:
    """`metrics.jsonl`: one line a step, appended and flushed; on resume, lines of repeated steps are cut.

    Args:
        path: The file.
        resume_step: The step that training goes on with; later lines are dropped.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(path) if line["step"] < resume_step] if path.exists() else []
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of a metrics file; a line torn by a crash can only be the last and is left out."""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def named_numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number of a metrics line under its path, such as `loss_per_domain/code`; the step is left out."""
    numbers: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            numbers |= named_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key != "step":
            numbers[prefix + key] = float(value)
    return numbers
