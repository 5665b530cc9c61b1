"""Bars for long evaluations: one for each model and task on stderr, with the time left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ultrafuser.evaluation.run import Watch


def silence_other_bars() -> None:
    """Keep lm-eval's bars from breaking ours; they read this when they are imported."""
    os.environ.setdefault("TQDM_DISABLE", "1")


@contextmanager
def evaluation_bars() -> Iterator[Watch]:
    """What to tell how far an evaluation is."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars: dict[tuple[str, str], int] = {}

        def watch(model: str, task: str, done: int, total: int) -> None:
            if (model, task) not in bars:
                bars[model, task] = progress.add_task(f"{model}: {task}", total=total)
            progress.update(bars[model, task], completed=done, total=total)  # type: ignore[arg-type]

        yield watch
