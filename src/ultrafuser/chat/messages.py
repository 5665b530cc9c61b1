"""A conversation: messages with a role and a content, in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ultrafuser.errors import DataError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str

    def to_dict(self) -> dict[str, str]:
        """The form chat templates and OpenAI-compatible servers use."""
        return {"role": self.role, "content": self.content}


Conversation = tuple[Message, ...]


def parse_conversation(messages: object) -> Conversation:
    """Read a list of ``{"role": ..., "content": ...}``.

    Raises:
        DataError: Not a list of such objects, or an unknown role; says which message.
    """
    if not isinstance(messages, list | tuple):
        raise DataError(f"messages must be a list, not {type(messages).__name__}")
    conversation: list[Message] = []
    for index, message in enumerate(messages):
        if isinstance(message, Message):
            conversation.append(message)
            continue
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(f"message {index} needs a role and a content that are strings, got {message!r:.120}")
        if message.get("role") not in ROLES:
            raise DataError(f"message {index} has role {message.get('role')!r}; known roles: {', '.join(ROLES)}")
        conversation.append(Message(message["role"], message["content"]))
    return tuple(conversation)
