"""Follow-ups: the user's next turn in a conversation, and its answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ultrafuser.synthesis.node import Answer, ChatMessage, Item, Node, fraction_of
from ultrafuser.synthesis.parsing import read_instruction, read_text
from ultrafuser.synthesis.recipe import StageName
from ultrafuser.synthesis.stages.ask import Asker
from ultrafuser.synthesis.stages.base import ItemDraft, View

ANSWERS: tuple[StageName, ...] = ("responses", "follow_up_responses")


@dataclass(frozen=True)
class FollowUpStage:
    """What a user says next, for a share of the responses."""

    share: float
    max_rounds: int
    asker: Asker
    name: StageName = "follow_ups"

    def plan(self, view: View, round: int) -> Iterator[Node]:
        """A request for every drawn response without a follow-up."""
        for item in view.without_child("responses", child=self.name):
            if fraction_of(item.key, self.name) < self.share:
                conversation = "\n\n".join(
                    f"{'Assistant' if message.role == 'assistant' else 'User'}: {message.content}"
                    for message in conversation_of(view.lineage(item))
                )
                messages = self.asker.ask(self.name, "instruction", conversation=conversation)
                yield self.asker.node(round=round, parent=item.key, messages=messages, answer="instruction")

    def read(self, node: Node, answer: Answer) -> list[ItemDraft]:
        """One message."""
        del node
        return [ItemDraft(read_instruction(answer.text))]

    def replaced(self, item: Item) -> str | None:
        """A follow-up takes no other's place."""
        del item
        return None


@dataclass(frozen=True)
class FollowUpResponseStage:
    """Answers of follow-ups, asked for with all of the conversation before."""

    max_rounds: int
    asker: Asker
    name: StageName = "follow_up_responses"

    def plan(self, view: View, round: int) -> Iterator[Node]:
        """A request for every follow-up without an answer."""
        (system,) = self.asker.ask("responses", None)
        for item in view.without_child("follow_ups", child=self.name):
            messages = (ChatMessage(role="system", content=system.content), *conversation_of(view.lineage(item)))
            yield self.asker.node(round=round, parent=item.key, messages=messages)

    def read(self, node: Node, answer: Answer) -> list[ItemDraft]:
        """The answer's text."""
        del node
        return [ItemDraft(read_text(answer.text))]

    def replaced(self, item: Item) -> str | None:
        """A response takes no other's place."""
        del item
        return None


def conversation_of(lineage: Sequence[Item]) -> list[ChatMessage]:
    """The turns at the end of a lineage: the last instruction before the first answer, and all that follows."""
    first = next(index for index, item in enumerate(lineage) if item.stage == "responses")
    return [
        ChatMessage(role="assistant" if item.stage in ANSWERS else "user", content=item.text)
        for item in lineage[first - 1 :]
    ]
