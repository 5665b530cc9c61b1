"""Nodes in the database: planned, claimed, answered. It is the queue of those who ask.

An answer, what it took and the items read from it are one transaction. Several processes share a PostgreSQL: a claim
there is a lease, which ends when its process is gone.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Connection, Select, func, select, true, update

from ultrafuser.synthesis.node import Answer, Node
from ultrafuser.synthesis.queue import Claimed, Failed, Finished, Postponed, Spent
from ultrafuser.synthesis.storage.database import Database
from ultrafuser.synthesis.storage.rows import draft_to_row, node_to_row, row_to_answer, row_to_node
from ultrafuser.synthesis.storage.schema import item, node, spent
from ultrafuser.synthesis.storage.writes import RELEASED, write_answers, write_failed, write_postponed, write_read_again

LEASE_S = 120.0
CHUNK = 500  # rows of one statement
_FINAL = ("answered", "unreadable")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Planned:
    """What became of nodes that were planned.

    Attributes:
        num_new: Nodes that are to be asked.
        known: Nodes whose answers are remembered, to be read again (`Store.read_again`).
    """

    num_new: int
    known: tuple[tuple[Node, Answer], ...] = ()


class Nodes:
    """The node table of a database, for one process.

    Attributes:
        owner: This process, among several.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._only: tuple[str, ...] | None = None

    def restrict(self, domains: Sequence[str]) -> None:
        """From now on, nodes of other domains are not there for those who ask."""
        others = select(node.c.key).where(node.c.domain.not_in(domains)).limit(1)
        # Looking for domains costs a little, and in SQLite nobody else adds any.
        self._only = tuple(domains) if not self.database.is_sqlite or self.database.rows(others) else None

    def plan(self, nodes: Sequence[Node]) -> Planned:
        """These nodes are wanted: what is not known waits from now on, in one transaction.

        A node that failed before it was forgotten waits again. Nodes are a few hundred at most.
        """
        keys = [n.key for n in nodes]
        now = time.time()
        with self.database.transaction() as connection:
            there = {row.key: row for row in connection.execute(_locked(keys))}
            new = {n.key: node_to_row(n, now=now) for n in nodes if n.key not in there}
            if new:
                connection.execute(self.database.insert(node).on_conflict_do_nothing(), list(new.values()))
            forgotten = [row for row in there.values() if not row.planned]
            if again := [row.key for row in forgotten if row.state in ("waiting", "failed")]:
                values = {"planned": True, "state": "waiting", "attempts": 0, "not_before": 0.0, "error": None}
                connection.execute(update(node).where(node.c.key.in_(again)).values(**values))
            if asked := [row.key for row in forgotten if row.state == "claimed"]:
                connection.execute(update(node).where(node.c.key.in_(asked)).values(planned=True))
            remembered = {row.key for row in forgotten if row.state in _FINAL}
            known: tuple[tuple[Node, Answer], ...] = ()
            if remembered:
                rows = connection.execute(select(node).where(node.c.key.in_(remembered)).order_by(node.c.key))
                known = tuple((row_to_node(row), row_to_answer(row)) for row in rows)
        return Planned(len(new) + len(again), known)

    def read_again(self, finished: Sequence[Finished]) -> None:
        """Items of remembered answers, which `plan` gave: nothing was asked, so nothing was spent."""
        with self.database.transaction() as connection:
            write_read_again(connection, finished)
            self._insert_items(connection, finished)

    def claim(self, wanted: Mapping[str, int], *, now: float) -> list[Claimed]:
        """At most so many waiting nodes of each endpoint whose time has come, in the order of their keys."""
        claimed = []
        with self.database.transaction() as connection:
            for endpoint, number in wanted.items():
                if number <= 0:
                    continue
                query = select(node).where(*self._waiting(endpoint), node.c.not_before <= now).order_by(node.c.key)
                rows = connection.execute(query.limit(number).with_for_update(skip_locked=True)).all()
                self._take(connection, [row.key for row in rows])
                claimed += [Claimed(row_to_node(row), row.attempts) for row in rows]
        return claimed

    def take(self, keys: Sequence[str]) -> list[Claimed]:
        """Claim these nodes, as far as they are waiting, due or not: their answers came by another way."""
        claimed = []
        for some in chunks(sorted(set(keys))):
            with self.database.transaction() as connection:
                query = select(node).where(node.c.key.in_(some), *self._waiting()).order_by(node.c.key)
                rows = connection.execute(query.with_for_update(skip_locked=True)).all()
                self._take(connection, [row.key for row in rows])
                claimed += [Claimed(row_to_node(row), row.attempts) for row in rows]
        return claimed

    def next_due(self) -> float | None:
        """When the first waiting node may be asked (seconds since the epoch); None: none is waiting."""
        if self.database.rows(select(node.c.key).where(*self._waiting(), node.c.not_before == 0.0).limit(1)):
            return 0.0  # seldom far to look, while the smallest of a million takes a while
        first: float | None = self.database.rows(select(func.min(node.c.not_before)).where(*self._waiting()))[0][0]
        return first

    def record(
        self, finished: Sequence[Finished] = (), postponed: Sequence[Postponed] = (), failed: Sequence[Failed] = ()
    ) -> None:
        """Write what became of claimed nodes, in one transaction that is on the disk when this returns.

        Of two answers to one node (its lease had ended) the first stays; both count as spent. An answer to a node that
        was forgotten meanwhile is kept without items.

        Raises:
            SynthesisError: It cannot be written; nothing of it was.
        """
        now = time.time()
        keys = [one.node.key for one in finished] + [one.key for one in postponed] + [one.key for one in failed]
        with self.database.transaction() as connection:
            rows = {row.key: row for row in connection.execute(_locked(keys))}
            unknown = [key for key in keys if key not in rows]
            assert not unknown, f"nodes that were never planned: {unknown[:3]}"
            open_ = {key for key, row in rows.items() if row.state not in _FINAL}
            mine = {key for key in open_ if rows[key].owner in (None, self.owner)}
            answered = [one for one in finished if one.node.key in open_]
            if answered:
                write_answers(connection, answered, now=now)
                self._insert_items(connection, [one for one in answered if rows[one.node.key].planned])
            if finished:
                self._add_spent(connection, finished)
            write_postponed(connection, [one for one in postponed if one.key in mine])
            write_failed(connection, [one for one in failed if one.key in mine], now=now)

    def release(self, keys: Sequence[str]) -> None:
        """Claimed nodes that were not asked are waiting again."""
        for some in chunks(list(keys)):
            mine = (node.c.key.in_(some), node.c.state == "claimed", node.c.owner == self.owner)
            with self.database.transaction() as connection:
                connection.execute(update(node).where(*mine).values(RELEASED))

    def waiting(self, endpoint: str) -> Iterator[Node]:
        """All waiting nodes of an endpoint, due or not, in the order of their keys, a few in memory at a time."""
        after = ""
        while True:
            query = select(node).where(*self._waiting(endpoint), node.c.key > after).order_by(node.c.key).limit(CHUNK)
            rows = self.database.rows(query)
            yield from map(row_to_node, rows)
            if len(rows) < CHUNK:
                return
            after = rows[-1].key

    def known(self, keys: Sequence[str]) -> set[str]:
        """Those of the keys that are nodes, whatever their state."""
        parts = (select(node.c.key).where(node.c.key.in_(some)) for some in chunks(list(keys)))
        return {row.key for part in parts for row in self.database.rows(part)}

    def spent(self) -> Spent:
        """By every process so far."""
        columns = (spent.c.num_answers, spent.c.prompt_tokens, spent.c.completion_tokens, spent.c.cost)
        row = self.database.rows(select(*(func.coalesce(func.sum(column), 0) for column in columns)))[0]
        return Spent(int(row[0]), int(row[1]), int(row[2]), float(row[3]))

    def renew(self) -> None:
        """Hold on to what this process claims, and let go what others held too long: PostgreSQL alone has leases."""
        if self.database.is_sqlite:
            return
        is_claimed = node.c.state == "claimed"
        with self.database.transaction() as connection:
            mine = update(node).where(is_claimed, node.c.owner == self.owner)
            connection.execute(mine.values(lease_until=_server_time() + LEASE_S))
            stale = select(node.c.key).where(is_claimed, node.c.lease_until < _server_time())
            keys = stale.order_by(node.c.key).with_for_update(skip_locked=True)
            connection.execute(update(node).where(node.c.key.in_(keys)).values(RELEASED))

    def release_all(self) -> None:
        """What this process claims waits again; in SQLite, where nobody else can be asking, all that is claimed."""
        where = [node.c.state == "claimed"]
        if not self.database.is_sqlite:
            where.append(node.c.owner == self.owner)
        with self.database.transaction() as connection:
            connection.execute(update(node).where(*where).values(RELEASED))

    def _waiting(self, endpoint: str | None = None) -> list[ColumnElement[bool]]:
        where: list[ColumnElement[bool]] = [node.c.state == "waiting", node.c.planned == true()]
        if endpoint is not None:
            where.append(node.c.endpoint == endpoint)
        if self._only is not None:
            where.append(node.c.domain.in_(self._only))
        return where

    def _take(self, connection: Connection, keys: Sequence[str]) -> None:
        values: dict[str, Any] = {"state": "claimed", "owner": self.owner}
        if not self.database.is_sqlite:
            values["lease_until"] = _server_time() + LEASE_S
        for some in chunks(keys):
            connection.execute(update(node).where(node.c.key.in_(some)).values(values))

    def _insert_items(self, connection: Connection, finished: Sequence[Finished]) -> None:
        rows = [draft_to_row(one.node, n, draft) for one in finished for n, draft in enumerate(one.items)]
        if rows:
            connection.execute(self.database.insert(item).on_conflict_do_nothing(), rows)

    def _add_spent(self, connection: Connection, finished: Sequence[Finished]) -> None:
        totals: dict[tuple[str, str], Spent] = {}
        for one in finished:
            place = (one.node.domain, one.node.stage)
            totals[place] = _sum(totals.get(place, Spent()), one.answer)
        insert = self.database.insert(spent)
        columns = ("num_answers", "prompt_tokens", "completion_tokens", "cost")
        insert = insert.on_conflict_do_update(
            index_elements=["owner", "domain", "stage"],
            set_={name: spent.c[name] + insert.excluded[name] for name in columns},
        )
        owner = "" if self.database.is_sqlite else self.owner
        for (domain, stage), total in totals.items():
            values = {name: getattr(total, name) for name in columns}
            connection.execute(insert.values(owner=owner, domain=domain, stage=stage, **values))


def chunks(values: Sequence[T], size: int = CHUNK) -> Iterator[Sequence[T]]:
    """A sequence in parts that a statement can hold."""
    return (values[start : start + size] for start in range(0, len(values), size))


def _sum(total: Spent, answer: Answer) -> Spent:
    return Spent(
        total.num_answers + 1,
        total.prompt_tokens + answer.prompt_tokens,
        total.completion_tokens + answer.completion_tokens,
        total.cost + answer.cost,
    )


def _locked(keys: Sequence[str]) -> Select[Any]:
    columns = (node.c.key, node.c.planned, node.c.state, node.c.owner)
    return select(*columns).where(node.c.key.in_(keys)).order_by(node.c.key).with_for_update()


def _server_time() -> ColumnElement[Any]:
    return func.extract("epoch", func.clock_timestamp())
