"""Making a stage's requests: which endpoint, which seed, and the prompt filled in.

Everything that is drawn is drawn by hash of the request's place, so planning again gives the same nodes.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ultrafuser.synthesis.domain import Domain
from ultrafuser.synthesis.node import ChatMessage, Item, ItemState, Node, Request, content_key, fraction_of
from ultrafuser.synthesis.parsing import FORMATS
from ultrafuser.synthesis.recipe import ResolvedSampling, StageName, SynthesisRecipe
from ultrafuser.synthesis.stages.base import View

NONE_YET = "(none yet)"
MAX_EXAMPLE_CHARACTERS = 3000
# What a later stage put a more complex form in place of counts as it did before, so plans do not depend on that.
EVER_KEPT: tuple[ItemState, ...] = ("kept", "replaced")


@dataclass(frozen=True)
class Asker:
    """Makes the nodes of one stage of one domain."""

    stage: StageName
    domain: Domain
    recipe: SynthesisRecipe

    @cached_property
    def _sampling(self) -> ResolvedSampling:
        return self.recipe.sampling(self.stage)

    def node(
        self,
        *,
        round: int,
        parent: str | None,
        slot: int = 0,
        messages: Sequence[ChatMessage] = (),
        prompt: str | None = None,
        stop: tuple[str, ...] = (),
        answer: str | None = None,
        detail: Mapping[str, Any] | None = None,
    ) -> Node:
        """A request at its place, to an endpoint and with a seed that the place draws."""
        place = self.place(round, parent, slot)
        sampling = self._sampling
        endpoint = sampling.endpoint[int(fraction_of(place, "endpoint") * len(sampling.endpoint))]
        request = Request(
            endpoint=endpoint,
            model=self.recipe.endpoints[endpoint].model,
            messages=tuple(messages),
            prompt=prompt,
            answer=answer,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop=stop,
            seed=int(fraction_of(place, "seed") * 2**31),
        )
        return Node(self.domain.name, self.stage, round, parent, slot, request, dict(detail or {}))

    def place(self, round: int, parent: str | None, slot: int) -> str:
        """What draws are made with: the request's place and the recipe's seed."""
        return content_key(self.recipe.seed, self.domain.name, self.stage, round, parent, slot)

    def ask(self, file: str, answer: str | None, **values: str) -> tuple[ChatMessage, ...]:
        """The prompt file as a user's message, filled with these values and those of the domain."""
        values = self.domain.common | values
        if answer is not None:
            values["format"] = FORMATS[answer]
        return (ChatMessage(role="user", content=self.domain.prompts[file].render(**values)),)

    def avoid(self, items: Iterable[Item], place: str) -> str:
        """A list of what there is already: all of it if that is short, else a part drawn anew by every request."""
        settings = self.domain.settings
        drawn = draw(items, settings.max_avoid, f"avoid:{place}")
        return bullets([shortened(item.text, settings.max_avoid_characters) for item in drawn])

    def forms(self, place: str) -> str:
        """Some kinds of task, others in every request."""
        settings = self.domain.settings
        drawn = sorted(settings.forms, key=lambda form: fraction_of(form, f"forms:{place}"))
        return bullets(drawn[: settings.forms_per_request]) if drawn else "- any"


def draw(items: Iterable[Item], number: int, purpose: str) -> list[Item]:
    """So many of a stream, drawn by their keys; memory for those alone."""
    return heapq.nsmallest(number, items, key=lambda item: (fraction_of(item.key, purpose), item.key))


def bullets(texts: Sequence[str]) -> str:
    """A Markdown list, one line a text."""
    return "\n".join(f"- {' '.join(text.split())}" for text in texts) or NONE_YET


def numbered(texts: Sequence[str]) -> str:
    """Texts one below the other, each as it stands: code must keep its lines."""
    return "\n\n".join(
        f"Example {number}:\n{text[:MAX_EXAMPLE_CHARACTERS].strip()}" for number, text in enumerate(texts, start=1)
    )


def shortened(text: str, characters: int) -> str:
    """The text, cut at a word where it is too long."""
    text = " ".join(text.split())
    if len(text) <= characters:
        return text
    return text[:characters].rpartition(" ")[0].rstrip(",;:.") + " ..."


def spread(missing: int, per_request: int, *, round: int, max_rounds: int) -> list[int]:
    """How many items each request of this round asks for.

    What is missing is spread over the rounds that are left but the last, which is for losses; so later requests can
    name what earlier ones gave, and all is asked in time however much it is.
    """
    requests = -(-missing // per_request)
    now = -(-requests // max(1, max_rounds - 1 - round))
    return [min(per_request, missing - number * per_request) for number in range(now)]


def quotas(
    view: View, target: int, *stages: StageName, among: Collection[str] | None = None
) -> Iterator[tuple[Item, int]]:
    """Every kept item of these stages with its part of a target, parts differing by one at most.

    Args:
        among: Keys of the items that can have a part; None: all.
    """
    items = (item for item in view.items(*stages) if among is None or item.key in among)
    number = view.count(*stages) if among is None else sum(item.key in among for item in view.items(*stages))
    for index, item in enumerate(items):
        yield item, target * (index + 1) // number - target * index // number


def topic_values(view: View, topic: Item) -> dict[str, str]:
    """What prompts may say of a topic."""
    return {
        "topic": topic.text,
        "relevance": str(topic.detail.get("relevance") or "-"),
        "use_case": str(topic.detail.get("use_case") or "-"),
        "path": " > ".join(ancestor.text for ancestor in view.lineage(topic)),
    }
