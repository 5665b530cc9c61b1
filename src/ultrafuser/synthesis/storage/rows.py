"""Between rows of the tables and what they stand for."""

from __future__ import annotations

import json
from typing import Any

from ultrafuser.synthesis.node import Answer, Item, Node, Request, item_key
from ultrafuser.synthesis.stages.base import ItemDraft


def node_to_row(node: Node, *, now: float) -> dict[str, Any]:
    """A node that waits."""
    return {
        "key": node.key,
        "domain": node.domain,
        "stage": node.stage,
        "round": node.round,
        "parent": node.parent,
        "slot": node.slot,
        "detail": _dump(node.detail),
        "request": node.request.model_dump_json(),
        "endpoint": node.request.endpoint,
        "planned": True,
        "state": "waiting",
        "attempts": 0,
        "not_before": 0.0,
        "created": now,
    }


def row_to_node(row: Any) -> Node:
    """The node of a row of the node table."""
    request = Request.model_validate_json(row.request)
    node = Node(row.domain, row.stage, row.round, row.parent, row.slot, request, json.loads(row.detail))
    node.__dict__["key"] = row.key  # hashed once; `cached_property` finds it here
    return node


def row_to_answer(row: Any) -> Answer:
    """The answer in a row of the node table that has one."""
    return Answer(
        text=row.answer,
        finish_reason=row.finish_reason,
        prompt_tokens=row.prompt_tokens,
        completion_tokens=row.completion_tokens,
        cost=row.cost,
        model=row.model,
        is_estimated=row.is_estimated,
        seconds=row.seconds,
    )


def draft_to_row(node: Node, number: int, draft: ItemDraft) -> dict[str, Any]:
    """A new item, of this number among those of its node."""
    return {
        "key": item_key(node.key, number),
        "node": node.key,
        "parent": node.parent if draft.parent is None else draft.parent,
        "domain": node.domain,
        "stage": node.stage,
        "round": node.round,
        "text": clean(draft.text),
        "detail": _dump(draft.detail),
        "state": "new",
    }


def row_to_item(row: Any) -> Item:
    """The item of a row of the item table."""
    return Item(
        key=row.key,
        node=row.node,
        parent=row.parent,
        domain=row.domain,
        stage=row.stage,
        round=row.round,
        text=row.text,
        detail=json.loads(row.detail),
        state=row.state,
        gate=row.gate,
        reason=row.reason,
    )


def clean(text: str) -> str:
    """Text that every database takes: no NUL and no half of a surrogate pair, which models do write."""
    text = text.replace("\0", "\ufffd")
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _dump(detail: dict[str, Any]) -> str:
    return clean(json.dumps(detail, ensure_ascii=False, separators=(",", ":")))
