"""What flows through a synthesis: a node is one request and its answer, an item is one thing read from an answer.

A node's key is a hash of everything that decides its answer, so the same request is never made twice, whatever happens
to the program or the recipe. An item's key is its node's and its number there. Keys, and not the order in which answers
come, decide every order, so the same endpoint gives the same data set.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

NodeState = Literal["waiting", "claimed", "answered", "unreadable", "failed"]
ItemState = Literal["new", "kept", "dropped", "replaced"]
FinishReason = Literal["stop", "length", "other"]
NODE_STATES: tuple[NodeState, ...] = ("waiting", "claimed", "answered", "unreadable", "failed")


class ChatMessage(BaseModel):
    """One message of a request."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class Request(BaseModel):
    """What an endpoint is asked, but for how it is addressed.

    Attributes:
        endpoint: Its name in the recipe.
        model: The model's name there: another model gives another answer, so another key.
        messages: A conversation; empty where `prompt` is given.
        prompt: Text to go on with, for free sampling (`/completions`).
        answer: Name of the JSON schema of the answer (`parsing.SCHEMAS`); None: plain text.
        max_tokens: Of the answer.
        seed: Sent to endpoints that take one; different where the same request is made twice on purpose.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    endpoint: str
    model: str
    messages: tuple[ChatMessage, ...] = ()
    prompt: str | None = None
    answer: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 2048
    stop: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Node:
    """One request of a stage.

    Attributes:
        round: Of its stage, from 0: a stage asks again for what its gates dropped.
        parent: Key of the item it is about; None at the root.
        slot: Tells requests of one stage, round and parent apart.
        detail: What the stage wants to remember for reading the answer: keys of examples, a relation.
    """

    domain: str
    stage: str
    round: int
    parent: str | None
    slot: int
    request: Request
    detail: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """Hash of all fields: blake2b, 16 bytes, in hex."""
        place = [self.domain, self.stage, self.round, self.parent, self.slot, self.detail]
        return content_key(place, self.request.model_dump_json())


@dataclass(frozen=True, slots=True)
class Answer:
    """What an endpoint said, raw.

    Attributes:
        prompt_tokens: As the endpoint counts; by our own estimate where `is_estimated`.
        cost: In the recipe's money.
        model: As the endpoint calls itself.
        is_estimated: It told no usage, or one that cannot be true.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cost: float
    model: str
    is_estimated: bool = False
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Item:
    """A topic, an instruction or a response.

    Attributes:
        key: `item_key` of its node and number.
        node: Key of the node whose answer holds it.
        parent: Key of the item it was made from; None at the root.
        stage: That made it, which is also what it is.
        text: Name of a topic, text of an instruction or a response.
        detail: Everything else: relevance and use case of a topic, relation of an instruction.
    """

    key: str
    node: str
    parent: str | None
    domain: str
    stage: str
    round: int
    text: str
    detail: dict[str, Any] = field(default_factory=dict)
    state: ItemState = "new"
    gate: str | None = None  # that dropped it
    reason: str | None = None


def item_key(node: str, number: int) -> str:
    """The key of the item of this number in a node's answer."""
    return content_key([node, number])


def content_key(*parts: Any) -> str:
    """Hash of plain values: blake2b, 16 bytes, in hex."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def fraction_of(key: str, purpose: str) -> float:
    """A number in [0, 1) that is fixed by a key and independent for every purpose: draws without a state."""
    digest = hashlib.blake2b(f"{purpose}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
