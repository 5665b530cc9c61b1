"""Response loss of a Generator on given conversations, with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ultrafuser.chat.messages import Conversation
from ultrafuser.evaluation.intervals import Interval, bootstrap_mean_interval
from ultrafuser.generation import AnswerScore, Generator


class LossScore(NamedTuple):
    """Mean NLL over the response tokens of some conversations.

    Attributes:
        loss: Nats per token, with a 95% bootstrap interval over conversations.
        num_tokens: Response tokens, end tokens included.
        answers: The score of each conversation.
    """

    loss: Interval
    num_tokens: int
    answers: list[AnswerScore]

    @property
    def mean_weights(self) -> list[float]:
        """Mean gate weights over response tokens, one per specialist; empty without a gate."""
        rows = [row for answer in self.answers for row in answer.gate_weights]
        return [float(value) for value in np.mean(rows, axis=0)] if rows else []


def score_losses(generator: Generator, conversations: Sequence[Conversation], *, seed: int = 0) -> LossScore:
    """Score the assistant messages of every conversation.

    Args:
        generator: Anything that scores given answers.
        conversations: Each ends with an assistant message.
        seed: Of the bootstrap.
    """
    answers = generator.score(conversations)
    tokens = [answer.num_tokens for answer in answers]
    interval = bootstrap_mean_interval([answer.loss for answer in answers], tokens, seed=seed)
    return LossScore(interval, sum(tokens), answers)
