"""What became of one request, as the queue is told: finished, to be asked again, or given up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ultrafuser.synthesis.asking.endpoints.refusal import Refusal
from ultrafuser.synthesis.node import Answer, Node, fraction_of
from ultrafuser.synthesis.queue import Claimed, Failed, Finished, Postponed
from ultrafuser.synthesis.stages.base import ItemDraft, UnreadableError

LONGEST_BACKOFF_S = 60.0

Read = Callable[[Node, Answer], list[ItemDraft]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One of three, and the node it is about."""

    node: Node
    finished: Finished | None = None
    postponed: Postponed | None = None
    failed: Failed | None = None


def finish(node: Node, answer: Answer, read: Read) -> tuple[Outcome, Exception | None]:
    """An answered node with the items read from it.

    An answer that was paid for is kept whatever reading it does: a bug there is handed on beside the outcome.
    """
    try:
        return Outcome(node, finished=Finished(node, answer, tuple(read(node, answer)))), None
    except UnreadableError as error:
        return Outcome(node, finished=Finished(node, answer, unreadable=str(error))), None
    except Exception as error:
        why = f"reading it failed: {type(error).__name__}"
        return Outcome(node, finished=Finished(node, answer, unreadable=why)), error


def outcome_of_refusal(
    claimed: Claimed, refusal: Refusal, *, max_attempts: int, backoff_s: float, has_answered: bool
) -> Outcome:
    """A node without an answer: asked again later, or given up.

    Args:
        max_attempts: Refusals for load and missing connections are no attempts.
        backoff_s: The wait after the first attempt; it doubles with each, up to a minute, with a jitter by key.
        has_answered: The endpoint has answered something, so a refused request is the request's own fault.
    """
    node, num_attempts = claimed.node, claimed.num_attempts + refusal.is_attempt
    is_hopeless = refusal.kind == "request" and (refusal.is_sure or has_answered)
    if is_hopeless or (refusal.is_attempt and num_attempts >= max_attempts):
        return Outcome(node, failed=Failed(node.key, refusal.message))
    wait_s = min(backoff_s * 2.0 ** min(max(num_attempts - 1, 0), 30), LONGEST_BACKOFF_S)
    wait_s *= 0.5 + fraction_of(node.key, f"backoff {num_attempts}")
    return Outcome(node, postponed=Postponed(node.key, time.time() + wait_s, refusal.message, refusal.is_attempt))
