"""What was made, as records: each conversation with its place among the topics and the models it comes from.

A record begins with an instruction and its answer and goes on with the follow-ups that were kept. Records come one by
one, in the order of (round, key) of their answers, so reading takes the same memory for any number of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from sqlalchemy import select

from ultrafuser.chat.messages import Message
from ultrafuser.synthesis.node import Item, fraction_of
from ultrafuser.synthesis.recipe import TOPIC_STAGES, SynthesisRecipe
from ultrafuser.synthesis.stages.base import View
from ultrafuser.synthesis.storage.rows import row_to_item
from ultrafuser.synthesis.storage.schema import item, node
from ultrafuser.synthesis.storage.store import Store

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
BATCH_RECORDS = 200  # whose origins are looked up at once


@dataclass(frozen=True, slots=True)
class Origin:
    """Who answered a node: an endpoint of the recipe, and the model as it calls itself."""

    endpoint: str
    model: str


@dataclass(frozen=True, slots=True)
class SynthesisRecord:
    """One conversation.

    Attributes:
        id: Key of the first answer.
        meta_topic: Name; None where it was sampled without a topic. So the other topics.
        relation: How its instruction came to be: seed, strong, weak, free, complicated or evolved.
        lineage: The stages it went through, the first topic first.
        instruction: Who wrote the instruction.
        response: Who wrote the answer.
        unit: Decides its split: equal for all records of a topic.
    """

    id: str
    messages: tuple[Message, ...]
    domain: str
    meta_topic: str | None
    sub_topic: str | None
    fine_topic: str | None
    relation: str
    lineage: tuple[str, ...]
    instruction: Origin
    response: Origin
    language: str
    unit: str


def relation_of(stage: str) -> str:
    """How an instruction of this stage came to be."""
    return "seed" if stage == "instructions" else stage


def read_synthesis(store: Store, domain: str, *, language: str) -> Iterator[SynthesisRecord]:
    """The records of a domain whose answers were kept.

    Args:
        store: Of the synthesis.
        domain: Its name.
        language: Of the domain.
    """
    responses = store.view(domain).items("responses")
    while batch := list(islice(responses, BATCH_RECORDS)):
        lineages = _lineages(store, batch)
        origins = _origins(store, {one.node for lineage in lineages for one in lineage[-2:]})
        questions = _first_children(store, [response.key for response in batch], "follow_ups")
        answers = _first_children(store, [question.key for question in questions.values()], "follow_up_responses")
        for lineage in lineages:
            question = questions.get(lineage[-1].key)
            answer = answers.get(question.key) if question is not None else None
            further = () if question is None or answer is None else (question, answer)
            yield _record(lineage, further, origins, language)


def _lineages(store: Store, items: Sequence[Item]) -> list[list[Item]]:
    """Each item behind its ancestors, the root first; one query for each level, not for each item."""
    known: dict[str, Item] = {}
    level = {one.parent for one in items if one.parent is not None}
    while level:
        rows = store.database.rows(select(item).where(item.c.key.in_(level)))
        found = [row_to_item(row) for row in rows]
        known |= {one.key: one for one in found}
        level = {one.parent for one in found if one.parent is not None} - known.keys()
    lineages = []
    for one in items:
        lineage = [one]
        while (parent := lineage[0].parent) is not None:
            lineage.insert(0, known[parent])
        lineages.append(lineage)
    return lineages


def _first_children(store: Store, parents: Sequence[str], stage: str) -> dict[str, Item]:
    """By parent, the first kept item of a stage that was made from it."""
    where = (item.c.parent.in_(parents), item.c.stage == stage, item.c.state == "kept")
    rows = store.database.rows(select(item).where(*where).order_by(item.c.round.desc(), item.c.key.desc()))
    return {row.parent: row_to_item(row) for row in rows}


def _origins(store: Store, nodes: set[str]) -> dict[str, Origin]:
    query = select(node.c.key, node.c.endpoint, node.c.model).where(node.c.key.in_(nodes))
    return {row.key: Origin(row.endpoint, row.model) for row in store.database.rows(query)}


def _record(
    lineage: Sequence[Item], further: Sequence[Item], origins: Mapping[str, Origin], language: str
) -> SynthesisRecord:
    *_, instruction, response = lineage
    topics = {one.stage: one for one in lineage if one.stage in TOPIC_STAGES}
    names = {stage: one.text for stage, one in topics.items()}
    turns = (instruction, response, *further)
    messages = [Message("user" if turn % 2 == 0 else "assistant", one.text) for turn, one in enumerate(turns)]
    place = topics.get("sub_topics") or topics.get("meta_topics") or lineage[0]
    return SynthesisRecord(
        id=response.key,
        messages=tuple(messages),
        domain=response.domain,
        meta_topic=names.get("meta_topics"),
        sub_topic=names.get("sub_topics"),
        fine_topic=names.get("fine_topics"),
        relation=relation_of(instruction.stage),
        lineage=tuple(one.stage for one in lineage),
        instruction=origins[instruction.node],
        response=origins[response.node],
        language=language,
        unit=topic_unit(place),
    )


def topic_unit(topic: Item) -> str:
    """What decides a topic's split: its name, so that topics of one name are on one side in every domain."""
    return " ".join(topic.text.casefold().split())


class TopicSplit:
    """Which side a topic's records are on: the lowest hashes validate, of each domain at least one if it has two."""

    def __init__(self, store: Store, recipe: SynthesisRecipe) -> None:
        self._fraction = recipe.export.validation_fraction
        self._always: set[str] = set()
        if self._fraction > 0:
            for domain in recipe.domains:
                self._always |= self._lowest(store.view(domain))

    def side(self, record: SynthesisRecord) -> Split:
        """Of a record."""
        if record.unit in self._always or self._draw(record.unit) < self._fraction:
            return "validation"
        return "train"

    def _lowest(self, view: View) -> set[str]:
        used = {topic.key: topic_unit(topic) for topic in view.items("sub_topics")}
        units = set(used.values())
        return {min(units, key=self._draw)} if len(units) > 1 else set()

    @staticmethod
    def _draw(unit: str) -> float:
        return fraction_of(unit, "split")


def as_messages(record: SynthesisRecord, recipe: SynthesisRecipe) -> dict[str, Any]:
    """A record as plain values, one row of the data set."""
    return {
        "id": record.id,
        "messages": [message.to_dict() for message in record.messages],
        "domain": record.domain,
        "meta_topic": record.meta_topic,
        "sub_topic": record.sub_topic,
        "fine_topic": record.fine_topic,
        "relation": record.relation,
        "lineage": list(record.lineage),
        "model": record.response.model,
        "endpoint": record.response.endpoint,
        "instruction_model": record.instruction.model,
        "licence": licence_of(record.response.endpoint, recipe),
        "language": record.language,
    }


def licence_of(endpoint: str, recipe: SynthesisRecipe) -> str:
    """Of what an endpoint writes: its own, else the data set's."""
    config = recipe.endpoints.get(endpoint)  # one that has left the recipe since is not there
    return (config.licence if config is not None else None) or recipe.export.licence


def as_ultrachat(record: SynthesisRecord) -> dict[str, Any]:
    """The form of UltraChat: texts in turn, the user's first."""
    return {"id": record.id, "data": [message.content for message in record.messages]}
