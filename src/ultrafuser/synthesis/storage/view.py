"""What stages and gates read from the store: the items of one domain, a page at a time.

Every order is (round, key), taken from an index, so a page costs the same wherever it lies and no cursor stays open.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, bindparam, func, literal, select, tuple_

from ultrafuser.errors import DataError
from ultrafuser.synthesis.gates.base import Bands
from ultrafuser.synthesis.node import Item, ItemState
from ultrafuser.synthesis.recipe import StageName
from ultrafuser.synthesis.storage.database import Database
from ultrafuser.synthesis.storage.rows import row_to_item
from ultrafuser.synthesis.storage.schema import band, item, node

_PAGE = 500
_MAX_DEPTH = 64


# Made once, for they are wanted for every item: making a statement takes longer than running it.
_CANDIDATES = (
    select(item)
    .where(
        item.c.key.in_(
            select(band.c.item).where(
                band.c.scope == bindparam("scope"), band.c.band.in_(bindparam("bands", expanding=True))
            )
        ),
        item.c.state == "kept",
    )
    .order_by(item.c.key)
)
_ITEM = select(item).where(item.c.key == bindparam("of"))
_FINISH_REASON = select(node.c.finish_reason).where(node.c.key == bindparam("of"))


def _select_ancestors() -> Select[Any]:
    above = select(item, literal(0).label("depth")).where(item.c.key == bindparam("of")).cte("above", recursive=True)
    further = item.alias("further")
    next_up = select(*further.c, above.c.depth + 1).where(further.c.key == above.c.parent, above.c.depth < _MAX_DEPTH)
    above = above.union_all(next_up)
    return select(above).order_by(above.c.depth.desc())


_ANCESTORS = _select_ancestors()


class StoreView:
    """The items of a domain (`stages.base.View`)."""

    def __init__(self, database: Database, domain: str) -> None:
        self._database = database
        self._domain = domain

    def items(
        self, *stages: StageName, states: tuple[ItemState, ...] = ("kept",), parent: str | None = None
    ) -> Iterator[Item]:
        """Items of these stages in the order of (round, key); with `parent` only those made from it."""
        parents = () if parent is None else (item.c.parent == parent,)
        parts = [self._pages(stage, state, *parents) for stage in stages for state in states]
        return parts[0] if len(parts) == 1 else heapq.merge(*parts, key=lambda one: (one.round, one.key))

    def item(self, key: str) -> Item:
        """One item, of whatever state.

        Raises:
            DataError: The domain has no such item.
        """
        rows = self._database.rows(_ITEM, {"of": key})
        if not rows or rows[0].domain != self._domain:
            raise DataError(f"domain {self._domain} has no item {key}")
        return row_to_item(rows[0])

    def count(self, *stages: StageName, states: tuple[ItemState, ...] = ("kept",)) -> int:
        """How many items there are."""
        query = select(func.count()).select_from(item).where(*self._of(stages, states))
        return int(self._database.rows(query)[0][0])

    def count_by_parent(self, *stages: StageName, states: tuple[ItemState, ...] = ("kept",)) -> Mapping[str, int]:
        """The same for every parent that has any; a mapping as large as the number of parents: for topics alone."""
        query = select(item.c.parent, func.count()).where(*self._of(stages, states), item.c.parent.is_not(None))
        return {row[0]: row[1] for row in self._database.rows(query.group_by(item.c.parent))}

    def lineage(self, item: Item) -> list[Item]:
        """The item's ancestors, the root first, itself last."""
        return [*ancestors(self._database, item), item]

    def without_child(self, *of: StageName, child: StageName) -> Iterator[Item]:
        """Kept items of the stages `of` that have no kept item of the stage `child` made from them."""
        made = item.alias("made")
        has_child = select(made.c.key).where(made.c.parent == item.c.key, made.c.stage == child, made.c.state == "kept")
        parts = [self._pages(stage, "kept", ~has_child.exists()) for stage in of]
        return heapq.merge(*parts, key=lambda one: (one.round, one.key))

    def _pages(self, stage: StageName, state: ItemState, *where: ColumnElement[bool]) -> Iterator[Item]:
        own = (*self._of((stage,), (state,)), *where)
        after: tuple[int, str] = (-1, "")
        while True:
            rows = self._database.rows(page(select(item).where(*own), after, _PAGE))
            yield from map(row_to_item, rows)
            if len(rows) < _PAGE:
                return
            after = (rows[-1].round, rows[-1].key)

    def _of(self, stages: Sequence[StageName], states: Sequence[ItemState]) -> list[ColumnElement[bool]]:
        return [item.c.domain == self._domain, _among(item.c.stage, stages), _among(item.c.state, states)]


class StoreBands:
    """Bands of signatures in the store (`gates.base.Bands`); scopes are a domain's own."""

    def __init__(self, database: Database, domain: str) -> None:
        self._database = database
        self._domain = domain
        self._insert = database.insert(band).on_conflict_do_nothing()

    def candidates(self, scope: str, bands: Sequence[int]) -> list[Item]:
        """Kept items within a scope that share a band, in order of key."""
        values = {"scope": self._hash(scope), "bands": _signed(bands)}
        return [row_to_item(row) for row in self._database.rows(_CANDIDATES, values)]

    def add(self, scope: str, item: Item, bands: Sequence[int]) -> None:
        """Remember an item that is kept."""
        number = self._hash(scope)
        rows = [{"scope": number, "band": one, "item": item.key} for one in sorted(set(_signed(bands)))]
        if rows:
            self._database.write(self._insert, rows)

    def _hash(self, scope: str) -> int:
        digest = hashlib.blake2b(f"{self._domain}\0{scope}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big", signed=True)


class StoreGateContext:
    """What a gate may know beside the item (`gates.base.GateContext`)."""

    def __init__(self, database: Database, domain: str) -> None:
        self._database = database
        self.bands: Bands = StoreBands(database, domain)

    def parent(self, item: Item) -> Item | None:
        """What the item was made from."""
        return parent_of(self._database, item)

    def siblings(self, item: Item) -> list[Item]:
        """Other items of its stage made from the same parent, whatever their state, in the order of (round, key)."""
        return siblings_of(self._database, item)

    def finish_reason(self, item: Item) -> str:
        """How the endpoint says that the answer with this item ended."""
        rows = self._database.rows(_FINISH_REASON, {"of": item.node})
        return str(rows[0][0])


def page(query: Select[Any], after: tuple[int, str], size: int) -> Select[Any]:
    """The next items of a query in the order of (round, key)."""
    behind = tuple_(item.c.round, item.c.key) > tuple_(*after)
    return query.where(behind).order_by(item.c.round, item.c.key).limit(size)


def parent_of(database: Database, one: Item) -> Item | None:
    """The item that this one was made from."""
    if one.parent is None:
        return None
    rows = database.rows(_ITEM, {"of": one.parent})
    return row_to_item(rows[0]) if rows else None


def siblings_of(database: Database, one: Item) -> list[Item]:
    """Other items of its domain and stage with the same parent."""
    parent = item.c.parent.is_(None) if one.parent is None else item.c.parent == one.parent
    same = (item.c.domain == one.domain, item.c.stage == one.stage, parent, item.c.key != one.key)
    return [row_to_item(row) for row in database.rows(select(item).where(*same).order_by(item.c.round, item.c.key))]


def ancestors(database: Database, one: Item) -> list[Item]:
    """All items above this one, the root first."""
    if one.parent is None:
        return []
    return [row_to_item(row) for row in database.rows(_ANCESTORS, {"of": one.parent})]


def _among(column: ColumnElement[str], values: Sequence[str]) -> ColumnElement[bool]:
    return column == values[0] if len(values) == 1 else column.in_(values)


def _signed(bands: Sequence[int]) -> list[int]:
    return [((value + 2**63) % 2**64) - 2**63 for value in bands]
