"""What persons said of items: an accepted one stays, a struck one goes with all that was made from it.

Verdicts are about an item's key, which its content fixes, so they outlive whatever is forgotten and derived anew.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import CTE, select, true, update

from ultrafuser.errors import DataError
from ultrafuser.synthesis.recipe import StageName
from ultrafuser.synthesis.storage.database import Database
from ultrafuser.synthesis.storage.rounds import REVIEW
from ultrafuser.synthesis.storage.rows import clean
from ultrafuser.synthesis.storage.schema import item, node, review, round_, verdict


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of a person, about one item."""

    item: str
    is_accepted: bool
    note: str = ""


class Verdicts:
    """The verdicts of a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def give(self, verdicts: Sequence[Verdict]) -> None:
        """Write verdicts and apply them, in one transaction; a later verdict about an item replaces an earlier one.

        A strike drops the item and all its descendants by the gate "review", and what waits to be asked about them is
        not asked. A struck item that is accepted after all is judged again, with its descendants.

        Raises:
            DataError: There is no such item; nothing was written.
        """
        with self._database.transaction():
            keys = [one.item for one in verdicts]
            there = {row.key for row in self._database.rows(select(item.c.key).where(item.c.key.in_(keys)))}
            if missing := [key for key in keys if key not in there]:
                raise DataError(f"a verdict is about item {missing[0]}, which is not there; load the page again")
            for one in verdicts:
                values = {"is_accepted": one.is_accepted, "note": clean(one.note), "given": time.time()}
                insert = self._database.insert(verdict).values(item=one.item, **values)
                self._database.write(insert.on_conflict_do_update(index_elements=["item"], set_=values))
                if one.is_accepted:
                    self._restore(one.item)
                else:
                    self._strike(one.item)

    def all(self, domain: str, stage: StageName | None = None) -> list[Verdict]:
        """Verdicts about items of a domain that are there, in order of key."""
        of = (verdict.c.item == item.c.key, item.c.domain == domain)
        query = select(verdict).where(*of).order_by(verdict.c.item)
        if stage is not None:
            query = query.where(item.c.stage == stage)
        return [Verdict(row.item, row.is_accepted, row.note) for row in self._database.rows(query)]

    def finish(self, domain: str, stage: StageName) -> None:
        """A person has looked at this stage's sample: the pipeline goes on."""
        values = {"given": time.time()}
        with self._database.transaction():
            insert = self._database.insert(review).values(domain=domain, stage=stage, **values)
            self._database.write(insert.on_conflict_do_update(index_elements=["domain", "stage"], set_=values))

    def is_finished(self, domain: str, stage: StageName) -> bool:
        """Whether a person has looked at it."""
        where = (review.c.domain == domain, review.c.stage == stage)
        return bool(self._database.rows(select(review.c.given).where(*where)))

    def _strike(self, key: str) -> None:
        family = select(_family(key).c.key)
        values = {"state": "dropped", "gate": REVIEW, "reason": "struck by a person"}
        under = {"state": "dropped", "gate": REVIEW, "reason": "made from what a person struck"}
        alive = item.c.state != "dropped"
        self._database.write(update(item).where(item.c.key == key, alive).values(values))
        self._database.write(update(item).where(item.c.key.in_(family), alive).values(under))
        again = {"state": "kept", "replaced_by": None}
        is_taken = (item.c.state == "replaced", item.c.replaced_by.in_(family))
        self._database.write(update(item).where(*is_taken).values(again))
        waits = (node.c.parent.in_(family), node.c.state == "waiting", node.c.planned == true())
        self._database.write(update(node).where(*waits).values(planned=False))

    def _restore(self, key: str) -> None:
        family = select(_family(key).c.key)
        struck = self._database.rows(
            select(item.c.domain, item.c.stage, item.c.round)
            .where(item.c.key.in_(family), item.c.gate == REVIEW)
            .distinct()
        )
        if not struck:
            return
        waits = (node.c.parent.in_(family), node.c.state == "waiting")
        self._database.write(update(node).where(*waits).values(planned=True))
        values = {"state": "new", "gate": None, "reason": None}
        self._database.write(update(item).where(item.c.key.in_(family), item.c.gate == REVIEW).values(values))
        for row in struck:
            of_round = (round_.c.domain == row.domain, round_.c.stage == row.stage, round_.c.round == row.round)
            self._database.write(update(round_).where(*of_round).values(is_judged=False))


def _family(key: str) -> CTE:
    """An item and all its descendants."""
    family = select(item.c.key).where(item.c.key == key).cte("family", recursive=True)
    child = item.alias("child")
    return family.union(select(child.c.key).where(child.c.parent == family.c.key))
