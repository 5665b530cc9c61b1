"""Review: a sample of topics and instructions on a page, and what a person said of them back into the store.

The sample depends on keys alone, so the page can be written again at any time: it shows the same items, with the
verdicts given so far. Topics take turns, so that none of them is overlooked. (The paper checked by hand: Section 3.2.)
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from ultrafuser.errors import ConfigError, DataError
from ultrafuser.files import read_json, write_text_atomically
from ultrafuser.synthesis.dataset.review_page import Section, ShownItem, VerdictWord, render_review
from ultrafuser.synthesis.node import Item, fraction_of
from ultrafuser.synthesis.recipe import INSTRUCTION_STAGES, TOPIC_STAGES, StageName, SynthesisRecipe
from ultrafuser.synthesis.stages.base import View
from ultrafuser.synthesis.storage.rounds import REVIEW
from ultrafuser.synthesis.storage.store import Store
from ultrafuser.synthesis.storage.verdicts import Verdict

REVIEWED: tuple[StageName, ...] = (*TOPIC_STAGES, *INSTRUCTION_STAGES, "complicated", "evolved")
CACHED_PARENTS = 50_000


class ItemVerdict(BaseModel):
    """What a person said of an item."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    item: str
    verdict: VerdictWord
    note: str = ""


class StageApproval(BaseModel):
    """A person has seen enough of a stage for the pipeline to go on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    domain: str
    stage: StageName


class VerdictFile(BaseModel):
    """What the page saves: `verdicts.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    synthesis: str
    verdicts: tuple[ItemVerdict, ...] = ()
    approved: tuple[StageApproval, ...] = ()


class Applied(NamedTuple):
    """What a file of verdicts did.

    Attributes:
        gone: Items that were in use before and are not now: struck ones and all that was made from them.
    """

    accepted: int
    struck: int
    gone: int
    approved: tuple[StageApproval, ...]

    def text(self) -> str:
        """In a line."""
        stages = ", ".join(f"{one.stage} of {one.domain}" for one in self.approved) or "none"
        return f"accepted {self.accepted}, struck {self.struck} ({self.gone} items gone); approved stages: {stages}"


def write_review(
    store: Store, recipe: SynthesisRecipe, path: Path, *, stages: Sequence[str] = (), size: int = 40
) -> list[Section]:
    """Write the review page.

    Args:
        store: Of the synthesis.
        recipe: Its recipe.
        path: The page.
        stages: Which to show; empty: every one that made topics or instructions.
        size: Items of each stage of each domain, at most.

    Returns:
        What is on the page.

    Raises:
        ConfigError: A stage is none that is reviewed.
        DataError: There is nothing to look at yet, or the page cannot be written.
    """
    chosen = check_stages(stages) or REVIEWED
    sections = [section for domain in recipe.domains for section in _sections(store, domain, chosen, size)]
    if not sections:
        raise DataError(f"synthesis {recipe.name} has no {' or '.join(stages) or 'topic or instruction'} to review yet")
    write_text_atomically(render_review(recipe.name, sections), path)
    return sections


def read_verdicts(path: Path) -> VerdictFile:
    """The file that the page saved.

    Raises:
        DataError: It is missing, or is none.
    """
    return read_json(path, VerdictFile, what="verdicts.json of a review page")


def apply_verdicts(store: Store, recipe: SynthesisRecipe, file: VerdictFile) -> Applied:
    """Write a person's verdicts into the store. A struck topic takes with it all that was made from it.

    Raises:
        DataError: The file is of another synthesis, or about an item that is not there; nothing was written.
    """
    if file.synthesis != recipe.name:
        raise DataError(f"these verdicts are of synthesis {file.synthesis!r}, and the recipe is {recipe.name!r}")
    if unknown := [one.domain for one in file.approved if one.domain not in recipe.domains]:
        raise DataError(f"the verdicts approve a stage of domain {unknown[0]!r}, which the recipe does not have")
    before = _num_struck(store)
    given = [Verdict(one.item, one.verdict == "accept", one.note) for one in file.verdicts]
    store.verdicts.give(given)
    for one in file.approved:
        store.verdicts.finish(one.domain, one.stage)
    num_accepted = sum(one.is_accepted for one in given)
    return Applied(num_accepted, len(given) - num_accepted, _num_struck(store) - before, file.approved)


def settle(store: Store, recipe: SynthesisRecipe, path: Path | None, stages: Sequence[str] = ()) -> Applied:
    """Apply a file of verdicts, if there is one, and approve these stages in every domain.

    Raises:
        ConfigError: A stage is none that is reviewed; nothing was written.
        DataError: The file is none, or does not fit the synthesis; nothing was written.
    """
    check_stages(stages)
    file = read_verdicts(path) if path is not None else VerdictFile(synthesis=recipe.name)
    applied = apply_verdicts(store, recipe, file)
    return applied._replace(approved=(*applied.approved, *approve_stages(store, recipe, stages)))


def approve_stages(store: Store, recipe: SynthesisRecipe, stages: Sequence[str]) -> tuple[StageApproval, ...]:
    """Let the pipeline go on behind these stages, in every domain of the recipe.

    Raises:
        ConfigError: A stage is none that is reviewed.
    """
    approved = tuple(
        StageApproval(domain=name, stage=stage) for name in recipe.domains for stage in check_stages(stages)
    )
    for one in approved:
        store.verdicts.finish(one.domain, one.stage)
    return approved


def _num_struck(store: Store) -> int:
    return sum(count.dropped.get(REVIEW, 0) for count in store.progress())


def _sections(store: Store, domain: str, stages: Sequence[StageName], size: int) -> Iterator[Section]:
    view = store.view(domain)
    for stage in stages:
        said = {one.item: one for one in store.verdicts.all(domain, stage)}
        if items := sample_items(view, stage, size, struck=said.keys()):
            shown = [_shown(item, view.lineage(item)[:-1], said.get(item.key)) for item in items]
            yield Section(domain, stage, shown, view.count(stage), store.verdicts.is_finished(domain, stage))


def _shown(item: Item, ancestors: Sequence[Item], verdict: Verdict | None) -> ShownItem:
    if verdict is None:
        return ShownItem(item, ancestors)
    return ShownItem(item, ancestors, "accept" if verdict.is_accepted else "strike", verdict.note)


def check_stages(stages: Sequence[str]) -> tuple[StageName, ...]:
    """The stages of these names.

    Raises:
        ConfigError: One is none that is reviewed.
    """
    found = tuple(stage for stage in REVIEWED if stage in stages)
    if unknown := [name for name in stages if name not in REVIEWED]:
        raise ConfigError(f"stage {unknown[0]!r} is none that is reviewed: choose from {', '.join(REVIEWED)}")
    return found


def sample_items(view: View, stage: StageName, size: int, *, struck: Collection[str] = ()) -> list[Item]:
    """Items of a stage for a person to look at, the same whenever there are the same items.

    Topics take turns in an order drawn by their keys; of each, the item whose draw is next.

    Args:
        view: Of the domain.
        stage: Which items.
        size: How many, at most.
        struck: Keys of dropped items that are shown all the same: a page written again shows what it was about.
    """
    topic_of = _topic_finder(view)
    lowest: defaultdict[str, list[tuple[float, str]]] = defaultdict(list)  # of each topic: -draw and key, a max-heap
    for item in view.items(stage, states=("kept", "new", "dropped")):
        if item.state == "dropped" and item.key not in struck:
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


def _topic_finder(view: View) -> Callable[[str | None], str]:
    """Says which topic the children of an item belong to: the item itself if it is one, else its parent's."""

    @lru_cache(CACHED_PARENTS)
    def topic_of(key: str | None) -> str:
        if key is None:
            return ""
        parent = view.item(key)
        return key if parent.stage in TOPIC_STAGES else topic_of(parent.parent)

    return topic_of
