"""The budget: what is spent, and what requests under way can still cost, never exceed the recipe's limits.

A request is only sent when the most it can cost is left. So an endpoint that keeps to `max_tokens` and charges by its
prices cannot make a run exceed its limits; requests that end without an answer, and may be charged nevertheless, count
with the most they can have cost for as long as the process lives.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from ultrafuser.synthesis.asking.endpoints.usage import cost, most_prompt_tokens
from ultrafuser.synthesis.node import Answer, Request
from ultrafuser.synthesis.queue import Spent
from ultrafuser.synthesis.recipe import EndpointConfig, LimitsConfig


@dataclass(frozen=True, slots=True)
class Share:
    """The most that a request can take of a budget."""

    tokens: int
    cost: float


@dataclass
class Budget:
    """What is left of `limits.max_cost` and `limits.max_tokens`."""

    limits: LimitsConfig
    spent_tokens: int = 0
    spent_cost: float = 0.0
    reserved_tokens: int = 0
    reserved_cost: float = 0.0
    lost_tokens: int = 0
    lost_cost: float = 0.0
    num_reserved: int = 0  # shares

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit at all."""
        return self.limits.max_cost is not None or self.limits.max_tokens is not None

    def set_spent(self, spent: Spent) -> None:
        """What all processes have spent, without what is reserved here."""
        self.spent_tokens, self.spent_cost = spent.prompt_tokens + spent.completion_tokens, spent.cost

    def reserve(self, share: Share) -> bool:
        """Set a share aside, if it is left."""
        if self._exceeded(share) is not None:
            return False
        self.hold(share)
        return True

    def settle(self, share: Share, answer: Answer | None, *, may_cost: bool = False) -> None:
        """Give a share back, for what was spent of it.

        Args:
            may_cost: There is no answer, but it may have been charged.
        """
        self.num_reserved -= 1
        self.reserved_tokens -= share.tokens
        # Sums of floats that were added and taken away again are not quite zero.
        self.reserved_cost = self.reserved_cost - share.cost if self.num_reserved else 0.0
        if answer is not None:
            self.add(answer)
        elif may_cost:
            self.lost_tokens += share.tokens
            self.lost_cost += share.cost

    def add(self, answer: Answer) -> None:
        """An answer whose share is given back with others."""
        self.spent_tokens += answer.prompt_tokens + answer.completion_tokens
        self.spent_cost += answer.cost

    def hold(self, share: Share) -> None:
        """Set a share aside that was sent before, left or not."""
        self.reserved_tokens += share.tokens
        self.reserved_cost += share.cost
        self.num_reserved += 1

    def left(self) -> Share | None:
        """What can still be reserved; None: there is no limit."""
        if not self.is_limited:
            return None
        taken_tokens = self.spent_tokens + self.reserved_tokens + self.lost_tokens
        taken_cost = self.spent_cost + self.reserved_cost + self.lost_cost
        max_tokens, max_cost = self.limits.max_tokens, self.limits.max_cost
        return Share(
            sys.maxsize if max_tokens is None else max(0, max_tokens - taken_tokens),
            math.inf if max_cost is None else max(0.0, max_cost - taken_cost),
        )

    def reached(self, share: Share) -> str:
        """The line that says why a share cannot be had: which limit, what is spent, what to raise."""
        name = self._exceeded(share) or "max_cost"
        if name == "max_cost":
            spent, next_, limit = f"{self.spent_cost:.4f}", f"{share.cost:.4f}", f"{self.limits.max_cost:g}"
            lost = f", up to {self.lost_cost:.4f} for calls without an answer" if self.lost_cost else ""
        else:
            spent, next_, limit = f"{self.spent_tokens:,} tokens", f"{share.tokens:,}", f"{self.limits.max_tokens:,}"
            lost = f", up to {self.lost_tokens:,} for calls without an answer" if self.lost_tokens else ""
        return (
            f"limits.{name} is reached: {spent} of {limit} spent{lost}, and the next request could take {next_}. "
            f"What is answered is kept; raise limits.{name} and run the same command"
        )

    def _exceeded(self, share: Share) -> str | None:
        max_cost, max_tokens = self.limits.max_cost, self.limits.max_tokens
        if max_cost is not None and self.spent_cost + self.reserved_cost + self.lost_cost + share.cost > max_cost:
            return "max_cost"
        tokens = self.spent_tokens + self.reserved_tokens + self.lost_tokens + share.tokens
        return "max_tokens" if max_tokens is not None and tokens > max_tokens else None


def most(request: Request, config: EndpointConfig, *, is_batch: bool = False) -> Share:
    """The most that a request can take."""
    prompt = most_prompt_tokens(request)
    return Share(prompt + request.max_tokens, cost(config, prompt, request.max_tokens, is_batch=is_batch))
