"""Composed records: two single-turn records of different domains joined into one question with one answer.

Trained on pure domains alone, the gate learns to choose a specialist for the whole prompt; composed records make it
switch inside an answer. They are ours, not the paper's.
"""

from __future__ import annotations

from ultrafuser.chat.messages import Conversation, Message

SEPARATOR = "\n"


def compose(first: Conversation, second: Conversation, *, separator: str = SEPARATOR) -> Conversation:
    """Ask both questions, give both answers, in order. Of longer conversations the first turn is taken."""
    question = separator.join(_first(conversation, "user") for conversation in (first, second))
    answer = separator.join(_first(conversation, "assistant") for conversation in (first, second))
    return (Message("user", question), Message("assistant", answer))


def _first(conversation: Conversation, role: str) -> str:
    return next(message.content for message in conversation if message.role == role)
