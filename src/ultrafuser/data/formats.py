"""Formats: the shapes in which instruction data is published, each turned into a conversation.

A table names every format, the keys it is recognised by and the function that reads it. What comes out is
always the same: contents without surrounding whitespace, an optional system message, then user and assistant
in turn, an assistant last.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from ultrafuser.chat.messages import Conversation, Message, Role, parse_conversation
from ultrafuser.errors import ConfigError, DataError

ProblemKind = Literal["unreadable", "unknown format", "malformed", "no prompt", "no response", "no domain"]
PROBLEM_KINDS: tuple[ProblemKind, ...] = get_args(ProblemKind)

RawRecord = Mapping[str, object]

SHAREGPT_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

# GSM8K's calculator annotations: "48/2 = <<48/2=24>>24". The equals sign keeps C++ streams out.
CALCULATOR_ANNOTATION = re.compile(r"<<[^<>\n]*=[^<>\n]*>>")


class RecordError(DataError):
    """One record cannot be used; `kind` says why, so that problems can be counted."""

    def __init__(self, kind: ProblemKind, message: str) -> None:
        super().__init__(message)
        self.kind: ProblemKind = kind


@dataclass(frozen=True, slots=True)
class Format:
    """One published shape.

    Attributes:
        keys: Keys that must be present; of each inner tuple, one is enough.
        read: Turns a raw record that has these keys into messages.
    """

    keys: tuple[tuple[str, ...], ...]
    read: Callable[[RawRecord], Iterable[Message]]

    def matches(self, raw: RawRecord) -> bool:
        """A key whose value is null counts as absent: tables have one column for every key."""
        return all(any(raw.get(key) is not None for key in choices) for choices in self.keys)

    def describe(self) -> str:
        """The keys in words, such as ``instruction + output|response``."""
        return " + ".join("|".join(choices) for choices in self.keys)


def to_conversation(raw: object, *, file_format: str = "auto") -> Conversation:
    """Recognise a raw record and turn it into a conversation fit for training.

    Args:
        raw: One object as read from a file.
        file_format: A name in `FORMATS`, or "auto" for the first format whose keys are all there.

    Raises:
        ConfigError: No format has this name.
        RecordError: The record has no known format, or no prompt or response; `kind` says which.
    """
    check_format(file_format)
    if not isinstance(raw, Mapping):
        raise RecordError("unreadable", f"a record must be an object with named fields, not {type(raw).__name__}")
    messages = list(FORMATS[_recognise(raw, file_format)].read(raw))
    if isinstance(system := raw.get("system"), str) and (not messages or messages[0].role != "system"):
        messages.insert(0, Message("system", system))
    return _normalise(messages)


def check_format(file_format: str) -> None:
    """Raise ConfigError unless `file_format` is "auto" or a name in `FORMATS`."""
    if file_format != "auto" and file_format not in FORMATS:
        raise ConfigError(f"no data format is called {file_format!r}; known: auto, {', '.join(FORMATS)}")


def _recognise(raw: RawRecord, file_format: str) -> str:
    candidates = FORMATS if file_format == "auto" else [file_format]
    for name in candidates:
        if FORMATS[name].matches(raw):
            return name
    found = ", ".join(str(key) for key in raw) or "none"
    if file_format != "auto":
        wanted = FORMATS[file_format].describe()
        raise RecordError("unknown format", f"format {file_format!r} needs the keys {wanted}; found: {found}")
    known = "; ".join(f"{name} ({known.describe()})" for name, known in FORMATS.items())
    raise RecordError("unknown format", f"no format has the keys {found}; known formats: {known}")


def _normalise(messages: Iterable[Message]) -> Conversation:
    stripped = [Message(message.role, message.content.strip()) for message in messages]
    system = stripped[:1] if stripped and stripped[0].role == "system" else []
    turns = stripped[len(system) :]
    if not any(message.role == "assistant" for message in turns):
        raise RecordError("no response", "there is no assistant message, so nothing to train on")
    for index, message in enumerate(turns):
        expected = "assistant" if index % 2 else "user"
        if message.role != expected:
            where = f"message {index + len(system)} has role {message.role!r} where {expected!r} is due"
            raise RecordError("malformed", f"{where}: an optional system message, then user and assistant in turn")
        if not message.content:
            kind: ProblemKind = "no prompt" if message.role == "user" else "no response"
            raise RecordError(kind, f"the {message.role} message {index + len(system)} is empty")
    if turns[-1].role == "user":
        raise RecordError("no response", "the last message is the user's, so it has no response")
    conversation = tuple(message for message in (*system, *turns) if message.content)
    _check_characters(conversation)
    return conversation


def _check_characters(conversation: Conversation) -> None:
    for index, message in enumerate(conversation):
        try:
            message.content.encode()
        except UnicodeEncodeError as error:
            code = f"U+{ord(message.content[error.start]):04X}"
            raise RecordError("unreadable", f"message {index} holds {code}, half of a surrogate pair") from error


def _text(raw: RawRecord, *keys: str) -> str:
    for key in keys:
        if (value := raw.get(key)) is None:
            continue
        if not isinstance(value, str):
            raise RecordError("malformed", f"field {key!r} must be text, not {type(value).__name__}")
        return value
    return ""


def _list(value: object, key: str) -> list[object]:
    if not isinstance(value, list | tuple):
        raise RecordError("malformed", f"field {key!r} must be a list, not {type(value).__name__}")
    return list(value)


def _pair(prompt: str, response: str) -> Conversation:
    return (Message("user", prompt), Message("assistant", response))


def _parse(messages: object) -> Conversation:
    try:
        return parse_conversation(messages)
    except DataError as error:
        raise RecordError("malformed", str(error)) from error


def _read_messages(raw: RawRecord) -> Conversation:
    return _parse(raw["messages"])


def _read_sharegpt(raw: RawRecord) -> Conversation:
    return tuple(
        _sharegpt_message(turn, index) for index, turn in enumerate(_list(raw["conversations"], "conversations"))
    )


def _sharegpt_message(turn: object, index: int) -> Message:
    if not isinstance(turn, Mapping):
        raise RecordError("malformed", f"conversations[{index}] must be an object, not {type(turn).__name__}")
    speaker = _text(turn, "from", "role")
    if speaker not in SHAREGPT_ROLES:
        known = ", ".join(SHAREGPT_ROLES)
        raise RecordError("malformed", f"conversations[{index}] is from {speaker!r}; known: {known}")
    return Message(SHAREGPT_ROLES[speaker], _text(turn, "value", "content"))


def _read_ultrachat(raw: RawRecord) -> Iterable[Message]:
    for index, content in enumerate(_list(raw["data"], "data")):
        if not isinstance(content, str):
            raise RecordError("malformed", f"data[{index}] must be text, not {type(content).__name__}")
        yield Message("assistant" if index % 2 else "user", content)


def _read_alpaca(raw: RawRecord) -> Conversation:
    parts = (_text(raw, "instruction").strip(), _text(raw, "input", "context").strip())
    return _pair("\n\n".join(part for part in parts if part), _text(raw, "output", "response"))


def _read_prompt_completion(raw: RawRecord) -> Conversation:
    prompt, completion = raw["prompt"], raw["response"] if raw.get("completion") is None else raw["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return _pair(prompt, completion)
    if isinstance(prompt, list | tuple) and isinstance(completion, list | tuple):
        return (*_parse(prompt), *_parse(completion))
    kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
    raise RecordError("malformed", f"prompt and completion must both be text or both lists of messages, not {kinds}")


def _read_rationale(raw: RawRecord) -> Conversation:
    options = [str(option) for option in _list(raw.get("options") or [], "options")]
    question = "\n".join([_text(raw, "question").strip(), *(["Options:", *options] if options else [])])
    answer = _text(raw, "answer", "correct").strip().strip("()")
    if not answer:
        raise RecordError("no response", "the answer is empty")
    return _pair(question, f"{_text(raw, 'rationale').strip()}\nThe answer is ({answer}).")


def _read_question_answer(raw: RawRecord) -> Conversation:
    answer = _text(raw, "answer", "solution", "response")
    return _pair(_text(raw, "question", "problem", "query"), CALCULATOR_ANNOTATION.sub("", answer))


# The order decides where several formats fit: the most telling keys come first.
FORMATS: dict[str, Format] = {
    "messages": Format((("messages",),), _read_messages),
    "sharegpt": Format((("conversations",),), _read_sharegpt),
    "alpaca": Format((("instruction",), ("output", "response")), _read_alpaca),
    "prompt-completion": Format((("prompt",), ("completion", "response")), _read_prompt_completion),
    "rationale": Format((("question",), ("rationale",), ("answer", "correct")), _read_rationale),
    "question-answer": Format(
        (("question", "problem", "query"), ("answer", "solution", "response")), _read_question_answer
    ),
    "ultrachat": Format((("data",),), _read_ultrachat),
}
