"""Reading answers: JSON where the endpoint keeps to a schema, and whatever else a model makes of the request.

Reading is a function of the text alone, takes time in proportion to it, and ends in items or in `UnreadableError`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from ultrafuser.synthesis.stages.base import UnreadableError

T = TypeVar("T")
MAX_CHARACTERS = 200_000  # of an answer: a longer one is a loop
MAX_REPAIRED = 30_000  # characters given to json_repair, which is thorough and slow
MAX_ITEMS = 500


def _schema(**properties: Any) -> dict[str, Any]:
    # Strict modes want every property required and no other allowed.
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


_TEXT = {"type": "string"}
SCHEMAS: dict[str, dict[str, Any]] = {
    "topics": _schema(topics={"type": "array", "items": _schema(name=_TEXT, relevance=_TEXT, use_case=_TEXT)}),
    "instructions": _schema(instructions={"type": "array", "items": _TEXT}),
    "instruction": _schema(instruction=_TEXT),
}
FORMATS: dict[str, str] = {
    "topics": (
        "Answer with JSON alone, in this form:\n"
        '{"topics": [{"name": "...", "relevance": "...", "use_case": "..."}, ...]}'
    ),
    "instructions": 'Answer with JSON alone, in this form:\n{"instructions": ["...", "...", ...]}',
    "instruction": 'Answer with JSON alone, in this form:\n{"instruction": "..."}',
}

_BEGINS_AS_JSON = re.compile(r"\s*(?:```\w*\s*)?[{\[]")
_FENCE = re.compile(r"```[\w+-]*\s*\n?(.*?)(?:```|\Z)", re.DOTALL)
_IN_LIST = re.compile(r"^\s{0,8}(?:[-*+•]|\(?\d{1,3}[.):])\s", re.MULTILINE)
_NUMBERED = re.compile(r"^\s{0,8}[(#]?\d{1,3}[.):]\s+")
_BULLET = re.compile(r"^\s{0,8}[-*+•]\s+")
_FIELD = re.compile(
    r"^(?:\W|\d){0,12}(?P<field>sub-?topic|meta-?topic|topic|name|title|relevance|use[ _-]?case|example use)\b"
    r"(?:\s*\d{1,3})?[*_\"'\s]{0,6}[:：][*_\s]{0,6}(?P<value>.*)$",
    re.IGNORECASE,
)
_PREAMBLE = re.compile(
    r"^(?:sure|certainly|of course|okay|ok|here (?:is|are)|here's|below (?:is|are)|the following|this is)\b[^\n]{0,200}"
    r":\s*$",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"^[*_#\s\"]{0,6}(?:(?:new|rewritten|evolved|revised|complex|final|user)\s+)?(?:instruction|prompt|question|message|"
    r"request|task)(?:\s+\d{1,3})?[*_\s\"]{0,6}:[*_\s]{0,6}",
    re.IGNORECASE,
)
_THINKING = re.compile(r"^\s*<(think|thinking|reasoning)>(.*?)(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_KEYS_OF_INSTRUCTIONS = ("instruction", "question", "prompt", "task", "text", "content", "message")


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as an answer describes it."""

    name: str
    relevance: str = ""
    use_case: str = ""


def read_topics(text: str, *, is_cut: bool = False) -> list[Topic]:
    """Topics of a JSON answer, of "Topic: ... Relevance: ..." blocks, or of a list of names.

    Args:
        is_cut: The answer was stopped before its end: its last topic is not whole.

    Raises:
        UnreadableError: There is none.
    """
    text = _bounded(text)
    topics = [topic for value in _json_list(text, "topics") if (topic := _topic(value))]
    topics = topics or list(islice(_blocks(text), MAX_ITEMS)) or [_point_topic(point) for point in _listed(text)]
    topics = [topic for topic in topics if topic.name]
    if not topics:
        raise UnreadableError("no topics in the answer")
    return _whole(topics, is_cut)


def read_instructions(text: str, *, is_cut: bool = False) -> list[str]:
    """Instructions of a JSON answer or of a numbered or bulleted list.

    Args:
        is_cut: The answer was stopped before its end: its last instruction is not whole.

    Raises:
        UnreadableError: There is none.
    """
    text = _bounded(text)
    found = [instruction for value in _json_list(text, "instructions") if (instruction := _instruction(value))]
    found = found or [_without_label(line) for line in _listed(text)]
    found = [instruction for instruction in found if instruction]
    if not found:
        raise UnreadableError("no instructions in the answer")
    return _whole(found, is_cut)


def read_instruction(text: str) -> str:
    """The one instruction of a JSON answer, or all of the text but "Here is the new one:" and its like.

    Raises:
        UnreadableError: Nothing is left.
    """
    text = _bounded(text)
    value = _json_value(text)
    if isinstance(value, list) and value:
        value = value[0]
    # JSON within prose may be what the instruction is about.
    is_json = _BEGINS_AS_JSON.match(text) is not None
    if isinstance(value, dict) and (is_json or "instruction" in value):
        found = _instruction(value)
        if not found:
            raise UnreadableError("no instruction in the answer")
        return found
    lines = text.strip().splitlines()
    if len(lines) > 1 and _PREAMBLE.match(lines[0].strip()):
        lines = lines[1:]
    found = _without_label("\n".join(lines).strip())
    if len(found) > 1 and found[0] == found[-1] == '"' and '"' not in found[1:-1]:
        found = found[1:-1].strip()
    if not found:
        raise UnreadableError("no instruction in the answer")
    return found


def read_text(text: str) -> str:
    """An answer in prose, without the thoughts that some models write before it.

    Raises:
        UnreadableError: Nothing is left.
    """
    return _bounded(text).strip()


def _whole(items: list[T], is_cut: bool) -> list[T]:
    if is_cut and not (items := items[:-1]):
        raise UnreadableError("out of tokens within the first item")
    return items[:MAX_ITEMS]


def _bounded(text: str) -> str:
    """The answer behind its thoughts, if it has a size to be read and anything in it."""
    if len(text) > MAX_CHARACTERS:
        raise UnreadableError(f"answer of more than {MAX_CHARACTERS} characters")
    if thinking := _THINKING.match(text):
        text = text[thinking.end() :]
        if not text.strip():
            raise UnreadableError("thoughts without an answer")
    # Text of half a character cannot be stored: databases want valid UTF-8, and no NUL.
    text = text.encode("utf-8", "replace").decode("utf-8").replace("\0", "")
    if not text.strip():
        raise UnreadableError("empty answer")
    return text


def _json_list(text: str, key: str) -> list[Any]:
    """The list that a JSON answer holds, under its key, under any other, or bare."""
    value = _json_value(text)
    if isinstance(value, dict):
        lists = [held for held in value.values() if isinstance(held, list)]
        listed = value.get(key)
        value = listed if isinstance(listed, list) else lists[0] if lists else [value]
    return value if isinstance(value, list) else []


def _json_value(text: str) -> Any:
    """The JSON of an answer, fenced, among talk, damaged or cut; None where nothing looks like it."""
    for piece in (text, *(match[1] for match in _FENCE.finditer(text))):
        try:
            return _container(json.loads(piece))
        except (ValueError, RecursionError):
            continue
    start = min((at for at in (text.find("{"), text.find("[")) if at >= 0), default=-1)
    if start < 0 or not re.match(r"\{\s*[\"'\w}]|\[\s*[\"'{\[\]]", text[start : start + 200]):
        return None
    if len(text) - start > MAX_REPAIRED or _IN_LIST.search(text[:start]):
        return None  # the points of a list may hold JSON
    return _container(_repaired(text[start:]))


def _repaired(text: str) -> Any:
    import json_repair

    try:
        return json_repair.loads(text)
    except (ValueError, RecursionError, IndexError, TypeError, KeyError, AttributeError):
        # The library means never to fail; on odd input it has, and a text it cannot mend is just no JSON.
        return None


def _container(value: Any) -> Any:
    return value if isinstance(value, dict | list) else None


def _topic(value: Any) -> Topic | None:
    if isinstance(value, str):
        return _line_topic(value)
    if not isinstance(value, dict):
        return None
    fields = {re.sub(r"[\s_-]", "", str(key)).casefold(): held for key, held in value.items() if isinstance(held, str)}
    name = next((fields[key] for key in ("name", "topic", "subtopic", "metatopic", "title") if key in fields), "")
    return Topic(_line(name), _line(fields.get("relevance", "")), _line(fields.get("usecase", "")))


def _instruction(value: Any) -> str | None:
    if isinstance(value, dict):
        texts = {str(key).casefold(): held for key, held in value.items() if isinstance(held, str)}
        value = next((texts[key] for key in _KEYS_OF_INSTRUCTIONS if key in texts), None)
    return value.strip() if isinstance(value, str) else None


def _blocks(text: str) -> Iterator[Topic]:
    """Topics written as lines of "Topic: ..." with "Relevance: ..." and "Use case: ..." below."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        if not (match := _FIELD.match(line[:4000])):
            continue
        field = re.sub(r"[\s_-]", "", match["field"]).casefold()
        field = {"relevance": "relevance", "usecase": "use_case", "exampleuse": "use_case"}.get(field, "name")
        if field == "name" and "name" in fields:
            yield Topic(**fields)
            fields = {}
        if field == "name" or "name" in fields:
            fields[field] = _line(match["value"]).strip('"*_, ')
    if "name" in fields:
        yield Topic(**fields)


def _point_topic(point: str) -> Topic:
    """A topic of a list: its name, with fields on lines of their own below or all on one line."""
    first, *rest = point.splitlines() or [""]
    fields = {}
    for line in rest:
        if match := _FIELD.match(line[:4000]):
            fields[re.sub(r"[\s_-]", "", match["field"]).casefold()] = _line(match["value"]).strip("*_")
    if "relevance" in fields or "usecase" in fields:
        return Topic(_line(first).strip('*_": '), fields.get("relevance", ""), fields.get("usecase", ""))
    return _line_topic(point)


def _line_topic(line: str) -> Topic:
    """A topic of one line: a name, and perhaps a colon or a dash and its relevance."""
    name, _, relevance = line.partition(":")
    if not relevance:
        name, _, relevance = re.sub(r"\s[-–—]\s", "\n", line, count=1).partition("\n")
    return Topic(_line(name).strip('*_" '), _line(relevance).strip('*_" '))


def _listed(text: str) -> list[str]:
    """Points of a list, each with the lines that go on with it; the list's own numbers tell, else its bullets."""
    lines = text.splitlines()
    for mark in (_NUMBERED, _BULLET):
        if any(mark.match(line) for line in lines):
            return _points(lines, mark)
    return []


def _points(lines: list[str], mark: re.Pattern[str]) -> list[str]:
    points: list[list[str]] = []
    blank = False
    for line in lines:
        if match := mark.match(line):
            if len(points) > MAX_ITEMS:
                break
            points.append([line[match.end() :]])
        elif points and not (blank and line.strip() and not line[0].isspace()):
            # An unindented line behind an empty one is talk after the list.
            points[-1].append(line)
        elif points:
            break
        blank = not line.strip()
    return ["\n".join(point).strip() for point in points]


def _without_label(text: str) -> str:
    return _LABEL.sub("", text, count=1).strip()


def _line(text: str) -> str:
    return " ".join(text.split())
