"""The worker: claims waiting nodes, asks endpoints, and writes what became of them.

A request keeps its place among those under way until its transaction is on the disk, so a kill repeats at most as many
calls as were under way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ultrafuser.synthesis.node import Answer, Node
from ultrafuser.synthesis.queue import Failed, Finished, Postponed, Queue
from ultrafuser.synthesis.recipe import SynthesisRecipe
from ultrafuser.synthesis.stages.base import ItemDraft

T = TypeVar("T")
Read = Callable[[Node, Answer], list[ItemDraft]]


class Run(Protocol):
    """Runs a function on the one thread that talks to the database."""

    async def __call__(self, function: Callable[[], T]) -> T:
        """What the function gives, or raises."""
        ...


@dataclass(frozen=True, slots=True)
class Recorded:
    """What one transaction wrote; `nodes` holds every node it is about, by key."""

    nodes: Mapping[str, Node]
    finished: tuple[Finished, ...] = ()
    postponed: tuple[Postponed, ...] = ()
    failed: tuple[Failed, ...] = ()


Listener = Callable[[Recorded], None]


class Worker:
    """Asks for what waits in a queue.

    Args:
        recipe: Whose endpoints are asked, within its limits.
        queue: Of nodes to ask. It is called through `run` alone, one call after another.
        run: Runs a function on the database's thread.
        read: Reads the items of an answer; raises UnreadableError.
        listener: Called in the event loop after every transaction; it must not block.
        backoff_s: The wait before a second attempt; it doubles with every further one.
    """

    def __init__(
        self,
        recipe: SynthesisRecipe,
        queue: Queue,
        run: Run,
        read: Read,
        listener: Listener = lambda recorded: None,
        *,
        backoff_s: float = 1.0,
    ) -> None:
        raise NotImplementedError

    async def work(self) -> None:
        """Ask until nothing is waiting or under way after `close`, or until `stop`; call it once.

        Whatever ends it, requests under way are waited for and written first, and nodes that were claimed but not
        asked are released.

        Raises:
            SynthesisError: A limit of the recipe is reached, a key or an address is wrong, or an endpoint gave no
                answer for too long; one line.
        """
        raise NotImplementedError

    def wake(self) -> None:
        """New nodes are waiting. From the event loop's thread, as all of these."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing more will come: `work` returns when nothing is waiting or under way."""
        raise NotImplementedError

    def stop(self) -> None:
        """Ask nothing more, and return when what is under way is written. The second call gives that up, too."""
        raise NotImplementedError
