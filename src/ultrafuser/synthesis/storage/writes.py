"""How it is written into the node table what became of a node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, update

from ultrafuser.synthesis.queue import Failed, Finished, Postponed
from ultrafuser.synthesis.storage.rows import clean
from ultrafuser.synthesis.storage.schema import node

UNCLAIMED: dict[str, Any] = {"owner": None, "lease_until": None}
RELEASED: dict[str, Any] = {"state": "waiting", **UNCLAIMED}

_ANSWER_FIELDS = ("state", "error", "answer", "finish_reason", "prompt_tokens", "completion_tokens", "cost", "model")
_ONE = update(node).where(node.c.key == bindparam("of"))
_ANSWER = _ONE.values(
    {name: bindparam(f"new_{name}") for name in (*_ANSWER_FIELDS, "is_estimated", "seconds", "finished")}
    | {"attempts": node.c.attempts + 1}
    | UNCLAIMED
)
_READ_AGAIN = _ONE.values(planned=True, state=bindparam("new_state"), error=bindparam("why"))
_POSTPONE = _ONE.values(
    {"attempts": node.c.attempts + bindparam("attempt"), "not_before": bindparam("until"), "error": bindparam("why")}
    | RELEASED
)
_FAIL = _ONE.values(
    {"state": "failed", "attempts": node.c.attempts + 1, "error": bindparam("why"), "finished": bindparam("at")}
    | UNCLAIMED
)


def write_answers(connection: Connection, finished: Sequence[Finished], *, now: float) -> None:
    """Raw answers, and whether they could be read."""
    if finished:
        connection.execute(_ANSWER, [_answer_row(one, now) for one in finished])


def write_read_again(connection: Connection, finished: Sequence[Finished]) -> None:
    """Whether remembered answers could be read this time."""
    if finished:
        rows = [{"of": one.node.key, "new_state": _state(one), "why": _reason(one)} for one in finished]
        connection.execute(_READ_AGAIN, rows)


def write_postponed(connection: Connection, postponed: Sequence[Postponed]) -> None:
    """Nodes that wait again."""
    if postponed:
        rows = [
            {"of": one.key, "attempt": int(one.counts), "until": one.until, "why": clean(one.error)}
            for one in postponed
        ]
        connection.execute(_POSTPONE, rows)


def write_failed(connection: Connection, failed: Sequence[Failed], *, now: float) -> None:
    """Nodes that are given up."""
    if failed:
        connection.execute(_FAIL, [{"of": one.key, "why": clean(one.error), "at": now} for one in failed])


def _state(one: Finished) -> str:
    return "answered" if one.unreadable is None else "unreadable"


def _reason(one: Finished) -> str | None:
    return None if one.unreadable is None else clean(one.unreadable)


def _answer_row(one: Finished, now: float) -> dict[str, Any]:
    answer = one.answer
    values = {
        "state": _state(one),
        "error": _reason(one),
        "answer": clean(answer.text),
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "cost": answer.cost,
        "model": clean(answer.model),
        "is_estimated": answer.is_estimated,
        "seconds": answer.seconds,
        "finished": now,
    }
    return {"of": one.node.key} | {f"new_{name}": value for name, value in values.items()}
