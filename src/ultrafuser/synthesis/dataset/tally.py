"""What became of items: how many of each stage were kept, and what each gate dropped and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import func, select

from ultrafuser.synthesis.recipe import StageName, SynthesisRecipe
from ultrafuser.synthesis.storage.schema import item
from ultrafuser.synthesis.storage.store import Store

MOST_REASONS = 5  # of a gate that are told


@dataclass(frozen=True, slots=True)
class StageTally:
    """A stage of a domain.

    Attributes:
        replaced: Items of this stage whose place another one took.
        drops: Items by (gate, reason).
    """

    domain: str
    stage: StageName
    kept: int
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
    """Every stage that made anything, in the recipe's order of domains."""
    place = (item.c.domain, item.c.stage, item.c.gate, item.c.reason)
    query = select(*place, func.count()).where(item.c.state == "dropped").group_by(*place).order_by(*place)
    drops: dict[tuple[str, str], dict[tuple[str, str], int]] = {}
    for domain, stage, gate, reason, number in store.database.rows(query):
        drops.setdefault((domain, stage), {})[gate, reason] = number
    tallies = [
        StageTally(
            count.domain,
            count.stage,
            count.items.get("kept", 0),
            count.items.get("replaced", 0),
            drops.get((count.domain, count.stage), {}),
        )
        for count in store.progress()
        if count.domain in recipe.domains
    ]
    order = list(recipe.domains)
    return sorted(tallies, key=lambda one: order.index(one.domain))


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
