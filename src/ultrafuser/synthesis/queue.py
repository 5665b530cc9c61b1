"""Between those who ask and what remembers: which nodes are to be asked, and what became of them.

The store is one; tests use another. All calls block and are made from one thread at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ultrafuser.synthesis.node import Answer, Node
from ultrafuser.synthesis.stages.base import ItemDraft


@dataclass(frozen=True, slots=True)
class Finished:
    """An answered node: its raw answer and what was read from it.

    Attributes:
        items: In order; empty where nothing could be read.
        unreadable: Why nothing could be read; None: it could.
    """

    node: Node
    answer: Answer
    items: tuple[ItemDraft, ...] = ()
    unreadable: str | None = None


@dataclass(frozen=True, slots=True)
class Postponed:
    """A node to be asked again.

    Attributes:
        until: Not before this time (seconds since the epoch).
        error: Why; one line.
        counts: Whether this was an attempt of the node: a refusal for load is none.
    """

    key: str
    until: float
    error: str
    counts: bool = True


@dataclass(frozen=True, slots=True)
class Failed:
    """A node that is given up; the error is one line."""

    key: str
    error: str


@dataclass(frozen=True, slots=True)
class Claimed:
    """A node this process is to ask, and how often it was tried before."""

    node: Node
    num_attempts: int


@dataclass(frozen=True, slots=True)
class Spent:
    """What all answers together took."""

    num_answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


class Queue(Protocol):
    """Nodes to ask."""

    def claim(self, wanted: Mapping[str, int], *, now: float) -> list[Claimed]:
        """At most so many waiting nodes of each endpoint whose time has come, in the order of their keys."""
        ...

    def next_due(self) -> float | None:
        """When the first waiting node may be asked (seconds since the epoch); None: none is waiting."""
        ...

    def record(
        self, finished: Sequence[Finished] = (), postponed: Sequence[Postponed] = (), failed: Sequence[Failed] = ()
    ) -> None:
        """Write what became of claimed nodes, in one transaction that is on the disk when this returns."""
        ...

    def release(self, keys: Sequence[str]) -> None:
        """Claimed nodes that were not asked are waiting again."""
        ...

    def spent(self) -> Spent:
        """By every process so far."""
        ...

    def waiting(self, endpoint: str) -> Iterator[Node]:
        """All waiting nodes of an endpoint, due or not, in the order of their keys, a few in memory at a time."""
        ...

    def take(self, keys: Sequence[str]) -> list[Claimed]:
        """Claim these nodes, as far as they are waiting, due or not: their answers came by another way."""
        ...

    def known(self, keys: Sequence[str]) -> set[str]:
        """Those of the keys that are nodes, whatever their state."""
        ...
