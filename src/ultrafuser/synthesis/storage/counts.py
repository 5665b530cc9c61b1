"""How far every stage is, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

from sqlalchemy import func, select, true

from ultrafuser.synthesis.queue import Spent
from ultrafuser.synthesis.recipe import StageName
from ultrafuser.synthesis.storage.database import Database
from ultrafuser.synthesis.storage.rounds import STAGE_ORDER
from ultrafuser.synthesis.storage.schema import item, node, spent


@dataclass(slots=True)
class StageCount:
    """A stage of a domain in numbers.

    Attributes:
        nodes: Planned ones by state (`node.NODE_STATES`).
        items: By state.
        dropped: Items dropped, by gate.
        spent: For all its nodes, those forgotten included.
    """

    domain: str
    stage: StageName
    nodes: dict[str, int] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)


def count_stages(database: Database) -> list[StageCount]:
    """All stages that have a node, in the order of domains and stages."""
    counts: dict[tuple[str, str], StageCount] = {}

    def of(domain: str, stage: StageName) -> StageCount:
        return counts.setdefault((domain, stage), StageCount(domain, stage))

    place = (node.c.domain, node.c.stage, node.c.state)
    for row in database.rows(select(*place, func.count()).where(node.c.planned == true()).group_by(*place)):
        of(row[0], row[1]).nodes[row[2]] = row[3]
    place = (item.c.domain, item.c.stage, item.c.state)
    for row in database.rows(select(*place, func.count()).group_by(*place)):
        of(row[0], row[1]).items[row[2]] = row[3]
    place = (item.c.domain, item.c.stage, item.c.gate)
    for row in database.rows(select(*place, func.count()).where(item.c.state == "dropped").group_by(*place)):
        of(row[0], row[1]).dropped[row[2]] = row[3]
    names = ("num_answers", "prompt_tokens", "completion_tokens", "cost")
    sums = [func.sum(spent.c[name]) for name in names]
    for row in database.rows(select(spent.c.domain, spent.c.stage, *sums).group_by(spent.c.domain, spent.c.stage)):
        of(row[0], row[1]).spent = Spent(int(row[2]), int(row[3]), int(row[4]), float(row[5]))
    return sorted(counts.values(), key=lambda one: (one.domain, STAGE_ORDER.index(one.stage)))
