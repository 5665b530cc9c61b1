"""What became of items: how many of each stage were kept, and what each gate dropped and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from ultrafuser.synthesis.recipe import StageName, SynthesisRecipe
from ultrafuser.synthesis.stages.base import View
from ultrafuser.synthesis.store import Store

STAGES: tuple[StageName, ...] = get_args(StageName)
MOST_REASONS = 5  # of a gate that are told


@dataclass(frozen=True, slots=True)
class StageTally:
    """A stage of a domain.

    Attributes:
        new: Items that no gate has seen yet.
        replaced: Items of this stage whose place another one took.
        drops: Items by (gate, reason).
    """

    domain: str
    stage: StageName
    kept: int
    new: int
    replaced: int
    drops: Mapping[tuple[str, str], int]

    @property
    def dropped(self) -> int:
        """By all gates."""
        return sum(self.drops.values())

    @property
    def by_gate(self) -> dict[str, int]:
        """Dropped items by gate, most first."""
        counts: Counter[str] = Counter()
        for (gate, _), number in self.drops.items():
            counts[gate] += number
        return dict(counts.most_common())

    def reasons(self, gate: str) -> list[tuple[str, int]]:
        """A gate's most frequent reasons."""
        found = Counter({reason: number for (name, reason), number in self.drops.items() if name == gate})
        return found.most_common(MOST_REASONS)


def tally(store: Store, recipe: SynthesisRecipe) -> list[StageTally]:
    """Every stage that made anything, in the order of domains and stages; dropped items are read one by one."""
    return [
        found
        for domain in recipe.domains
        for stage in STAGES
        if (found := _tally(store.view(domain), domain, stage)) is not None
    ]


def _tally(view: View, domain: str, stage: StageName) -> StageTally | None:
    kept, new, replaced = (view.count(stage, states=(state,)) for state in ("kept", "new", "replaced"))
    drops = Counter((item.gate or "?", item.reason or "?") for item in view.items(stage, states=("dropped",)))
    if not (kept or new or replaced or drops):
        return None
    return StageTally(domain, stage, kept, new, replaced, dict(drops.most_common()))


def drops_table(tallies: list[StageTally]) -> list[str]:
    """What gates dropped, as lines of a Markdown table; empty where nothing was."""
    rows = []
    for one in tallies:
        for gate, number in one.by_gate.items():
            reasons = "; ".join(f"{reason} ({count:,})" for reason, count in one.reasons(gate))
            rows.append(f"| {one.domain} | {one.stage} | {gate} | {number:,} | {cell(reasons)} |")
    head = ["| domain | stage | gate | dropped | reasons |", "| --- | --- | --- | ---: | --- |"]
    return [*head, *rows] if rows else []


def cell(text: str) -> str:
    """Text as it may stand in a cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
