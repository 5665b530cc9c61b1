"""How far a synthesis is, for the eye; a run may go on meanwhile."""

from __future__ import annotations

import io
from collections import Counter

from sqlalchemy import func, select, true

from ultrafuser.synthesis.dataset.tally import tally
from ultrafuser.synthesis.progress import Progress
from ultrafuser.synthesis.recipe import SynthesisRecipe
from ultrafuser.synthesis.storage.schema import node
from ultrafuser.synthesis.storage.store import Store

WIDTH = 120


def status_text(store: Store, recipe: SynthesisRecipe) -> str:
    """Stages with their requests and items, what each gate dropped and why most often, and what it cost so far."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    progress = Progress()
    progress.start(store.progress())
    stages = progress.table()
    stages.caption = None
    spent = store.spent()
    console = Console(file=io.StringIO(), width=WIDTH, highlight=False, markup=False)
    console.print(stages)
    for head, rows in (("dropped by", _drops(store, recipe)), ("requests", _problems(store))):
        if rows:
            table = Table(box=None, pad_edge=False)
            for name in ("domain", "stage", head, "number", "most often because"):
                table.add_column(name, justify="right" if name == "number" else "left")
            for row in rows:
                table.add_row(*(Text(value) for value in row))
            console.print()
            console.print(table)
    console.print(
        f"\n{spent.num_answers:,} answers; {spent.prompt_tokens:,} tokens read, {spent.completion_tokens:,} written; "
        f"cost {spent.cost:.2f}",
        soft_wrap=True,
    )
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip()


def _drops(store: Store, recipe: SynthesisRecipe) -> list[tuple[str, ...]]:
    return [
        (one.domain, one.stage, gate, f"{number:,}", one.reasons(gate)[0][0])
        for one in tally(store, recipe)
        for gate, number in one.by_gate.items()
    ]


def _problems(store: Store) -> list[tuple[str, ...]]:
    """Requests that were given up or gave nothing that could be read, by stage."""
    place = (node.c.domain, node.c.stage, node.c.state)
    wrong = (node.c.state.in_(("failed", "unreadable")), node.c.planned == true())
    counts = select(*place, node.c.error, func.count()).where(*wrong).group_by(*place, node.c.error)
    found: dict[tuple[str, str, str], Counter[str]] = {}
    for domain, stage, state, error, number in store.database.rows(counts.order_by(*place)):
        found.setdefault((domain, stage, state), Counter())[error or "?"] += number
    return [(*where, f"{errors.total():,}", errors.most_common(1)[0][0]) for where, errors in found.items()]
