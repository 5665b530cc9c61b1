"""Shard: one rank's specialist, which does what the first rank says and adds its part to the fused logits.

Hidden states stay where they are computed. The first rank knows each of their rows by a number, 0 standing for none,
and asks for what it needs of them.

Shapes: B choices, T new tokens, M rows whose next token is wanted, N specialists, H hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ultrafuser.engine.ranks import Ranks
from ultrafuser.engine.runner import Feed, Runner
from ultrafuser.errors import ModelError

log = logging.getLogger(__name__)

# Beyond it, sums of exp(score) lose digits; such rows are fused again with their weights.
LARGEST_SCORE = 30.0
_WINDOW = 32  # columns before the newest ones whose hidden states may still be asked for: longer than any draft


@dataclass(frozen=True, slots=True)
class Question:
    """What the ranks add up.

    Attributes:
        kind: "fused" is [M, V + N], exp(score) times logits beside the scores; "weighted" is [M, V], logits times
            `weights`; "scores" is [M, N].
        rows: Numbers of the hidden states of each specialist that is asked, M each.
        space: What is weighed, as in `fuse_logits`.
        weights: [M] of each specialist that is asked, for "weighted".
    """

    kind: Literal["fused", "weighted", "scores"]
    rows: dict[str, list[int]]
    space: str = "logits"
    weights: dict[str, list[float]] | None = None

    def to_json(self) -> dict[str, Any]:
        """For a message."""
        return asdict(self)


class Shard:
    """One specialist with its cache.

    Args:
        runner: Over a model that holds this specialist alone, with the gate.
        ranks: The others.
        vocab_size: V.
    """

    def __init__(self, runner: Runner, ranks: Ranks, *, vocab_size: int) -> None:
        self.runner, self.ranks, self.vocab_size = runner, ranks, vocab_size
        self.view = str(ranks.rank)
        self.kept = KeptRows()
        self._failure: Exception | None = None

    @torch.inference_mode()
    def take_part(self, message: dict[str, Any]) -> Tensor | None:
        """Do what a message says; on the first rank, the sum that it asks for.

        Raises:
            ModelError, OutOfMemoryError: As `Ranks.collect`.
        """
        question = Question(**message["question"]) if message["question"] is not None else None
        part: Tensor | None = None
        if self._failure is None:
            try:
                for order in message["orders"]:
                    self._obey(order)
                if question is not None:
                    part = self._answer(question)
            except Exception as error:  # whatever it is, the others wait for this rank in the collective
                self._failure = error
                if self.ranks.rank > 0:
                    log.exception("this rank failed")
        if question is None:
            return None
        failure, self._failure = self._failure, None
        return self.ranks.collect(part if part is not None else self._nothing(question), failure)

    def serve(self) -> None:
        """Do what the first rank says until it ends.

        Raises:
            ModelError: A process is gone, or this one failed.
        """
        lost: ModelError | None = None
        while "end" not in (message := self.ranks.receive()):
            try:
                self.take_part(message)
            except ModelError as error:
                lost = error  # the first rank has noticed, too, and asks next who is left
        self.ranks.say_goodbye()
        if message["end"] is not None:
            raise ModelError(f"the first rank has ended: {message['end']}") from lost

    def _obey(self, order: dict[str, Any]) -> None:
        if "copy" in order:
            source, target = order["copy"]
            self.runner.copy_slot(source, target, [order["lengths"][int(self.view)]])
            self.kept.copy(source, target)
        elif "clear" in order:
            self.runner.clear_slot(order["clear"])
        elif self.view in order["feeds"]:
            feed = order["feeds"][self.view]
            hidden = self.runner.hidden({0: Feed(feed["slots"], feed["starts"], feed["tokens"])})[0]
            self.kept.add(feed["first"], hidden, feed["slots"], feed["starts"])

    def _answer(self, question: Question) -> Tensor:
        """This specialist's part."""
        total = self._nothing(question)
        numbers = question.rows.get(self.view, [])
        wanted = [i for i, number in enumerate(numbers) if number]
        if not wanted:
            return total
        at = torch.tensor(wanted, device=total.device)
        hidden = self.kept.rows([numbers[i] for i in wanted])
        factor: Tensor | None = None
        if question.kind == "weighted":
            assert question.weights is not None
            factor = torch.tensor(question.weights[self.view], device=total.device)[at]
        else:
            model = self.runner.model
            scores = model.fusion_gate.score(hidden, model.names[0])
            # The last N columns hold each specialist's score.
            total[at, total.shape[1] - len(self.ranks.names) + self.ranks.rank] = scores
            if question.kind == "scores":
                return total
            factor = scores.clamp(-LARGEST_SCORE, LARGEST_SCORE).exp()
        values = self.runner.logits(0, hidden)
        if question.space == "logprobs":
            values = values.log_softmax(dim=-1)
        elif question.space == "probs":
            values = values.softmax(dim=-1)
        total[at, : self.vocab_size] = factor[:, None] * values
        return total

    def _nothing(self, question: Question) -> Float[Tensor, "M _"]:
        columns = {"fused": self.vocab_size + len(self.ranks.names), "weighted": self.vocab_size}
        num_columns = columns.get(question.kind, len(self.ranks.names))
        num_rows = len(next(iter(question.rows.values())))
        return torch.zeros((num_rows, num_columns), device=self.ranks.device)


class KeptRows:
    """Hidden states that may still be asked for: those of the last columns of every slot."""

    def __init__(self) -> None:
        self._passes: dict[int, Tensor] = {}  # first number -> [B * T, H]
        self._of_slot: dict[int, list[tuple[int, int, int]]] = {}  # first number, and columns from and to

    def add(self, first: int, hidden: Float[Tensor, "B T H"], slots: Sequence[int], starts: Sequence[int]) -> None:
        """Keep a pass whose rows are numbered from `first` on, row by row."""
        self._passes[first] = hidden.flatten(0, 1)
        for slot, start in zip(slots, starts, strict=True):
            old = [of for of in self._of_slot.get(slot, []) if of[1] < start and of[2] > start - _WINDOW]
            self._of_slot[slot] = [*old, (first, start, start + hidden.shape[1])]
        self._forget()

    def copy(self, source: int, target: int) -> None:
        """What belongs to a slot belongs to another, too."""
        self._of_slot[target] = list(self._of_slot.get(source, []))
        self._forget()

    def rows(self, numbers: Sequence[int]) -> Float[Tensor, "M H"]:
        """Rows by their numbers."""
        firsts = sorted(self._passes)
        parts = []
        for number in numbers:
            first = firsts[bisect_right(firsts, number) - 1]
            assert 0 <= number - first < len(self._passes[first]), f"row {number} is no longer kept"
            parts.append(self._passes[first][number - first])
        return torch.stack(parts)

    def __len__(self) -> int:
        return len(self._passes)

    def _forget(self) -> None:
        used = {first for kept in self._of_slot.values() for first, _, _ in kept}
        for first in set(self._passes) - used:
            del self._passes[first]
