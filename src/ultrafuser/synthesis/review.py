"""Review: a sample of topics and instructions on a page, and what a person said of them back into the store.

The sample depends on keys alone, so the page can be written again at any time: it shows the same items, with the
verdicts given so far. Topics take turns, so that none of them is overlooked. (The paper checked by hand: Section 3.2.)
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict

from ultrafuser.errors import ConfigError
from ultrafuser.files import read_json
from ultrafuser.synthesis.node import Item, fraction_of
from ultrafuser.synthesis.recipe import INSTRUCTION_STAGES, TOPIC_STAGES, StageName
from ultrafuser.synthesis.stages.base import View

REVIEWED: tuple[StageName, ...] = (*TOPIC_STAGES, *INSTRUCTION_STAGES, "complicated", "evolved")
REVIEW = "review"  # the gate, in the store, of what a person struck
CACHED_PARENTS = 50_000


class ItemVerdict(BaseModel):
    """What a person said of an item."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    item: str
    verdict: Literal["accept", "strike"]
    note: str = ""


class StageApproval(BaseModel):
    """A person has seen enough of a stage for the pipeline to go on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    domain: str
    stage: StageName


class Verdicts(BaseModel):
    """What the page saves: `verdicts.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    synthesis: str
    verdicts: tuple[ItemVerdict, ...] = ()
    approved: tuple[StageApproval, ...] = ()


class Applied(NamedTuple):
    """What verdicts did: `struck` counts descendants as well."""

    accepted: int
    struck: int
    approved: tuple[StageApproval, ...]

    def text(self) -> str:
        """In a line."""
        stages = ", ".join(f"{one.stage} of {one.domain}" for one in self.approved) or "none"
        return f"accepted {self.accepted}, struck {self.struck} with all made from them, approved stages: {stages}"


class ShownItem(NamedTuple):
    """An item on the page: its ancestors, the root first, and what was said of it before."""

    item: Item
    ancestors: Sequence[Item]
    verdict: ItemVerdict | None


class Section(NamedTuple):
    """A stage of a domain on the page; `total` counts the items there are, `kept` those in use."""

    domain: str
    stage: StageName
    items: Sequence[ShownItem]
    total: int
    is_approved: bool


def read_verdicts(path: Path) -> Verdicts:
    """The file that the page saved.

    Raises:
        DataError: It is missing, or is none.
    """
    return read_json(path, Verdicts, what="verdicts.json of a review page")


def check_stages(stages: Sequence[str]) -> tuple[StageName, ...]:
    """The stages of these names.

    Raises:
        ConfigError: One is none that is reviewed.
    """
    found = tuple(stage for stage in REVIEWED if stage in stages)
    if unknown := [name for name in stages if name not in REVIEWED]:
        raise ConfigError(f"stage {unknown[0]!r} is none that is reviewed: choose from {', '.join(REVIEWED)}")
    return found


def sample_items(view: View, stage: StageName, size: int) -> list[Item]:
    """Items of a stage for a person to look at, the same whenever there are the same items.

    Topics take turns in an order drawn by their keys; of each, the item whose draw is next. What was struck before is
    among them, or a page written again would not show what it was about.

    Args:
        view: Of the domain.
        stage: Which items.
        size: How many, at most.
    """
    topic_of = _topic_finder(view)
    lowest: defaultdict[str, list[tuple[float, str]]] = defaultdict(list)  # of each topic: -draw and key, a max-heap
    for item in view.items(stage, states=("kept", "new", "dropped")):
        if item.state == "dropped" and item.gate != REVIEW:
            continue
        entry = (-fraction_of(item.key, "review"), item.key)
        heap = lowest[topic_of(item.parent)]
        if len(heap) < size:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)
    topics = sorted(lowest, key=lambda key: fraction_of(key, "review topic"))
    queues = [sorted(lowest[topic], reverse=True) for topic in topics]
    turns = [
        queue[turn][1] for turn in range(max(map(len, queues), default=0)) for queue in queues if turn < len(queue)
    ]
    return [view.item(key) for key in turns[:size]]


def _topic_finder(view: View) -> _TopicFinder:
    """Says which topic the children of an item belong to: the item itself if it is one, else its parent's."""

    @lru_cache(CACHED_PARENTS)
    def topic_of(key: str | None) -> str:
        if key is None:
            return ""
        parent = view.item(key)
        return key if parent.stage in TOPIC_STAGES else topic_of(parent.parent)

    return topic_of


class _TopicFinder(Protocol):
    def __call__(self, key: str | None, /) -> str: ...
