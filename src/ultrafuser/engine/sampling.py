"""From fused logits to a token, for one choice.

Every position of a choice has noise of its own, a function of the seed and the position: the token is the one with
the largest probability over exponential noise (the Gumbel trick), which draws from the distribution exactly. So
neither other choices in the batch nor speculation change what a seed writes, and a draft made with the same noise
agrees with the fused model as often as the two distributions allow, up to a small factor.

Source of the coupling: Daliri, Musco, Suresh 2024 (arXiv 2408.07978), "drafter-invariant speculative decoding".

Shapes: V vocabulary.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ultrafuser.generation import SamplingParams

_MASK = (1 << 64) - 1
_KEPT = 10  # positions whose noise is kept: a draft and the fused model use the same, one after the other
_FEW = 256  # a nucleus is rarely larger; then no full sort is needed


class Sampler:
    """Chooses the tokens of one choice.

    Args:
        params: How.
        choice: Its number; each has a seed of its own.
        prompt: Ids that the repetition penalty counts besides the response: the longest row.
        ends: Ids that end a response, which `min_tokens` forbids.
    """

    def __init__(self, params: SamplingParams, *, choice: int, prompt: Sequence[int], ends: Collection[int]) -> None:
        self.params = params
        seed = secrets.randbits(62) if params.seed is None else params.seed
        self.seed = mix(seed, choice)
        self.prompt = tuple(prompt) if params.repetition_penalty != 1.0 else ()
        self.ends = sorted({*ends, *params.stop_token_ids}) if params.min_tokens else []
        self.bias: tuple[list[int], list[float]] | None = None
        if params.logit_bias:
            self.bias = ([token for token, _ in params.logit_bias], [value for _, value in params.logit_bias])
        self._generator: torch.Generator | None = None
        self._noises: dict[int, Tensor] = {}

    @property
    def takes_largest(self) -> bool:
        """Whether the token is simply the one with the largest logit, wherever the choice stands."""
        p = self.params
        penalised = p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0
        return p.temperature == 0 and not (penalised or self.bias or self.ends)

    def pick(self, logits: Float[Tensor, " V"], response: Sequence[int]) -> int:
        """The next token after `response`.

        Args:
            logits: Of the fused model, or of whoever drafts.
            response: Ids so far, drafted ones included.
        """
        if self.takes_largest:
            return int(logits.argmax())
        logits = self._penalised(logits.float(), response)
        if self.params.temperature == 0:
            return int(logits.argmax())
        probs = self._cut(logits / self.params.temperature)
        return int((probs / self._noise(len(response), logits)).argmax())

    def guess(self, logits: Float[Tensor, " V"], response: Sequence[int]) -> tuple[int, float]:
        """What `pick` gives, and how many logits the second-best token is behind it, noise included."""
        if not self.takes_largest:
            logits = self._penalised(logits.float(), response)
        if self.params.temperature == 0:
            token, first, second = _best_two(logits)
            return token, first - second
        scores = self._cut(logits / self.params.temperature) / self._noise(len(response), logits)
        token, first, second = _best_two(scores)
        return token, math.log(first / second) * self.params.temperature if second > 0 else math.inf

    def probabilities(self, logits: Float[Tensor, " V"], response: Sequence[int]) -> Float[Tensor, " V"]:
        """What `pick` draws from when the temperature is not 0."""
        probs = self._cut(self._penalised(logits.float(), response) / self.params.temperature)
        return probs / probs.sum()

    def _noise(self, position: int, like: Tensor) -> Tensor:
        if position not in self._noises:
            if self._generator is None:
                self._generator = torch.Generator(device=like.device)
            self._generator.manual_seed(mix(self.seed, position))
            self._noises.pop(position - _KEPT, None)
            self._noises[position] = torch.empty_like(like).exponential_(generator=self._generator)
        return self._noises[position]

    def _penalised(self, logits: Tensor, response: Sequence[int]) -> Tensor:
        p = self.params
        logits = logits.clone()
        if p.repetition_penalty != 1.0 and (self.prompt or response):
            ids = torch.unique(torch.tensor([*self.prompt, *response], device=logits.device))
            values = logits[ids]
            logits[ids] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        if (p.presence_penalty or p.frequency_penalty) and response:
            ids, counts = torch.unique(torch.tensor(list(response), device=logits.device), return_counts=True)
            logits[ids] -= p.presence_penalty + p.frequency_penalty * counts
        if self.bias is not None:
            ids_list, values_list = self.bias
            logits[torch.tensor(ids_list, device=logits.device)] += torch.tensor(values_list, device=logits.device)
        if self.ends and len(response) < p.min_tokens:
            logits[torch.tensor(self.ends, device=logits.device)] = -torch.inf
        return logits

    def _cut(self, logits: Tensor) -> Tensor:
        """Probabilities with top-k, top-p and min-p applied, each to what temperature gives; not summing to 1 again."""
        p = self.params
        probs = logits.softmax(dim=-1)
        if 0 < p.top_k < len(probs):
            kept = probs.topk(p.top_k).indices
            probs = torch.zeros_like(probs).index_copy(0, kept, probs[kept])
        if p.top_p < 1.0:
            kept = _nucleus(probs, p.top_p)
            probs = torch.zeros_like(probs).index_copy(0, kept, probs[kept])
        if p.min_p > 0.0:
            probs = torch.where(probs >= p.min_p * probs.max(), probs, 0.0)
        return probs


def mix(seed: int, number: int) -> int:
    """A seed for the `number`-th part of what `seed` stands for (the finaliser of SplitMix64)."""
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) >> 1


def _best_two(scores: Float[Tensor, " V"]) -> tuple[int, float, float]:
    """The best token, its score and the next best one's; several times as fast as `topk` here."""
    token = int(scores.argmax())
    rest = [part.max() for part in (scores[:token], scores[token + 1 :]) if len(part)]
    return token, float(scores[token]), max(map(float, rest))


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Ids of the fewest most likely tokens that hold `top_p` of the probability, at least one."""
    total = probs.sum()
    few = min(_FEW, len(probs))
    values, ids = probs.topk(few)
    if few < len(probs) and values.sum() < top_p * total:
        values, ids = probs.sort(descending=True)
    before = values.cumsum(dim=-1) - values
    return ids[before < top_p * total]
