"""Rounds of stages: what is planned, open and judged, and how all that is forgotten from a stage on.

Items, bands and rounds are derived from nodes. Forgetting them costs nothing but time: they are derived anew, and only
what was never asked is asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

from sqlalchemy import ColumnElement, and_, bindparam, delete, select, true, update

from ultrafuser.synthesis.gates.base import Gate
from ultrafuser.synthesis.node import Item
from ultrafuser.synthesis.recipe import StageName
from ultrafuser.synthesis.storage.database import Database
from ultrafuser.synthesis.storage.rows import clean, row_to_item
from ultrafuser.synthesis.storage.schema import band, basis, item, node, round_, verdict
from ultrafuser.synthesis.storage.view import StoreGateContext

STAGE_ORDER: tuple[StageName, ...] = get_args(StageName)
REVIEW = "review"  # the gate of what a person strikes
_PAGE = 200
_SETTLE = (
    update(item)
    .where(item.c.key == bindparam("of"))
    .values(state=bindparam("new_state"), gate=bindparam("by"), reason=bindparam("why"))
)


@dataclass(frozen=True, slots=True)
class Round:
    """One round of a stage.

    Attributes:
        num_nodes: That were planned; with none the stage has ended.
        is_judged: Its gates have seen every item.
    """

    number: int
    num_nodes: int
    is_judged: bool


class Rounds:
    """The rounds and items of a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of(self, domain: str, stage: StageName) -> list[Round]:
        """Rounds that are planned, in order."""
        query = select(round_).where(round_.c.domain == domain, round_.c.stage == stage).order_by(round_.c.round)
        return [Round(row.round, row.num_nodes, row.is_judged) for row in self._database.rows(query)]

    def add(self, domain: str, stage: StageName, number: int, num_nodes: int) -> None:
        """All nodes of this round are planned."""
        row = {"domain": domain, "stage": stage, "round": number, "num_nodes": num_nodes, "is_judged": num_nodes == 0}
        with self._database.transaction():
            self._database.write(self._database.insert(round_).on_conflict_do_nothing(), row)

    def is_open(self, domain: str, stage: StageName, number: int) -> bool:
        """Whether a node of this round is still to be answered."""
        of_round = (node.c.domain == domain, node.c.stage == stage, node.c.round == number, node.c.planned == true())
        query = select(node.c.key).where(*of_round, node.c.state.in_(("waiting", "claimed"))).limit(1)
        return bool(self._database.rows(query))

    def judge(
        self,
        domain: str,
        stage: StageName,
        number: int,
        gates: Sequence[Gate],
        replaced: Callable[[Item], str | None],
        *,
        within_s: float = 0.25,
    ) -> int:
        """Let gates judge new items of a round in the order of their keys, for a while, in one transaction.

        What a person has struck, or stands under such an item, is dropped by the gate "review".

        Args:
            replaced: The key of the item whose place a kept one takes (`Stage.replaced`).
            within_s: When this time has passed, what remains is left for the next call.

        Returns:
            How many items were judged; 0: all were, and the round is marked so.
        """
        context = StoreGateContext(self._database, domain)
        new = (item.c.domain == domain, item.c.stage == stage, item.c.state == "new", item.c.round == number)
        end = time.monotonic() + within_s
        num_judged = 0
        with self._database.transaction():
            rows = self._database.rows(select(item).where(*new).order_by(item.c.key).limit(_PAGE))
            items = [row_to_item(row) for row in rows]
            struck = self._struck(items)
            for one in items:
                self._judge(one, gates, replaced, context, one.key in struck)
                num_judged += 1
                if time.monotonic() > end:
                    break
            if not items:
                of_round = _in_round(domain, stage, number)
                self._database.write(update(round_).where(of_round).values(is_judged=True))
        return num_judged

    def _judge(
        self,
        one: Item,
        gates: Sequence[Gate],
        replaced: Callable[[Item], str | None],
        context: StoreGateContext,
        is_struck: bool,
    ) -> None:
        gate, reason = (REVIEW, "struck by a person") if is_struck else _first_objection(one, gates, context)
        state = "kept" if gate is None else "dropped"
        values = {"new_state": state, "by": gate, "why": None if reason is None else clean(reason), "of": one.key}
        self._database.write(_SETTLE, values)
        if gate is not None:
            return
        for each in gates:
            each.kept(one, context)
        if (other := replaced(one)) is not None:
            its = and_(item.c.key == other, item.c.state == "kept")
            self._database.write(update(item).where(its).values(state="replaced", replaced_by=one.key))

    def _struck(self, items: Sequence[Item]) -> set[str]:
        keys = [one.key for one in items]
        parents = {one.parent for one in items if one.parent is not None}
        query = select(verdict.c.item).where(verdict.c.item.in_(keys), verdict.c.is_accepted.is_(False))
        struck = {row.item for row in self._database.rows(query)}
        under = select(item.c.key).where(item.c.key.in_(parents), item.c.gate == REVIEW)
        dropped = {row.key for row in self._database.rows(under)}
        return struck | {one.key for one in items if one.parent in dropped}

    def forget(self, domain: str, stage: StageName) -> None:
        """Items, bands and rounds of this stage and all later ones go; nodes stay as a memory, verdicts too."""
        stages = STAGE_ORDER[STAGE_ORDER.index(stage) :]
        with self._database.transaction():
            self._forget(domain, stages)

    def retry_failed(self, domain: str) -> int:
        """Nodes that were given up wait again; how many.

        What was judged and planned after the first of them is derived anew, as if it had never failed.
        """
        failed = and_(node.c.domain == domain, node.c.state == "failed", node.c.planned == true())
        with self._database.transaction():
            places = self._database.rows(select(node.c.stage, node.c.round).where(failed).distinct())
            if not places:
                return 0
            number, stage = min((STAGE_ORDER.index(row.stage), row.round) for row in places)
            values = {"state": "waiting", "attempts": 0, "not_before": 0.0, "error": None}
            num_failed = self._database.write(update(node).where(failed).values(values))
            self._rewind(domain, STAGE_ORDER[number], stage)
        return num_failed

    def _rewind(self, domain: str, stage: StageName, number: int) -> None:
        """To the time before this round was judged."""
        self._forget(domain, STAGE_ORDER[STAGE_ORDER.index(stage) + 1 :])
        of_stage = (item.c.domain == domain, item.c.stage == stage)
        self._delete_items(and_(*of_stage, item.c.round > number))
        later = (round_.c.domain == domain, round_.c.stage == stage, round_.c.round > number)
        self._database.write(delete(round_).where(*later))
        its_nodes = (node.c.domain == domain, node.c.stage == stage, node.c.round > number)
        self._database.write(update(node).where(*its_nodes).values(planned=False))
        again = and_(*of_stage, item.c.round == number)
        self._undo(again)
        self._database.write(update(item).where(again).values(state="new", gate=None, reason=None, replaced_by=None))
        self._database.write(update(round_).where(_in_round(domain, stage, number)).values(is_judged=False))

    def _forget(self, domain: str, stages: Sequence[StageName]) -> None:
        self._delete_items(and_(item.c.domain == domain, item.c.stage.in_(stages)))
        for table in (round_, basis):
            self._database.write(delete(table).where(table.c.domain == domain, table.c.stage.in_(stages)))
        nodes = (node.c.domain == domain, node.c.stage.in_(stages))
        self._database.write(update(node).where(*nodes, node.c.planned == true()).values(planned=False))

    def _delete_items(self, where: ColumnElement[bool]) -> None:
        self._undo(where)
        self._database.write(delete(item).where(where))

    def _undo(self, where: ColumnElement[bool]) -> None:
        """Of items: their bands go, and what they took the place of has it again."""
        keys = select(item.c.key).where(where).correlate(None).scalar_subquery()
        self._database.write(delete(band).where(band.c.item.in_(keys)))
        again = {"state": "kept", "replaced_by": None}
        self._database.write(update(item).where(item.c.state == "replaced", item.c.replaced_by.in_(keys)).values(again))


def _first_objection(one: Item, gates: Sequence[Gate], context: StoreGateContext) -> tuple[str | None, str | None]:
    for gate in gates:
        if (reason := gate.judge(one, context)) is not None:
            return gate.name, reason
    return None, None


def _in_round(domain: str, stage: StageName, number: int) -> ColumnElement[bool]:
    return and_(round_.c.domain == domain, round_.c.stage == stage, round_.c.round == number)
