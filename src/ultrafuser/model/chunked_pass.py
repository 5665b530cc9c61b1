"""One pass over chunks of tokens: the loss of n linear heads whose logits are added, and its gradients.

The fused logits are one linear map of all hidden states, `sum_i w_i W_i h_i = [W_1|...|W_n] concat(w_i h_i)`, so their
loss needs one buffer of [C, V]: no logits per specialist, no copy of the heads.

Shapes: M tokens, C of them in a chunk, N specialists, H hidden size (may differ), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Rows of a head in one product; a bf16 head is then never copied to fp32 whole. A GPU multiplies all rows at once.
MOST_ROWS_ON_CPU = 1024


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the loss is a function of.

    Attributes:
        weights: Gate weights.
        labels: Token that each row predicts.
        hiddens: Last hidden states of each specialist, [M, H].
        heads: Weight of each head, [V, H]; rows beyond the fewest are not used.
        biases: Of each head, or None.
        dtypes: Type in which each head is multiplied.
        chunk: Tokens at a time.
        add_others: Adds to a chunk's logits [C, V], in place, those of specialists that other processes hold; None: all
            are here.
    """

    weights: Float[Tensor, "M N"]
    labels: Int[Tensor, " M"]
    hiddens: Sequence[Tensor]
    heads: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    dtypes: Sequence[torch.dtype]
    chunk: int
    add_others: Callable[[Tensor], None] | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to make besides the NLL: gradients of the weights and of each specialist's tensors, and the details."""

    weights: bool
    hiddens: Sequence[bool]
    heads: Sequence[bool]
    biases: Sequence[bool]
    details: bool = False


@dataclass(frozen=True, slots=True)
class Losses:
    """NLL of each token; with details whether the likeliest was right and each specialist's own NLL, else empty."""

    nll: Float[Tensor, " M"]
    hit: Bool[Tensor, " _"]
    specialist_nll: Float[Tensor, "_ N"]


@dataclass(frozen=True, slots=True)
class Gradients:
    """Of the inputs of the same names; None where not wanted."""

    weights: Tensor | None
    hiddens: Sequence[Tensor | None]
    heads: Sequence[Tensor | None]
    biases: Sequence[Tensor | None]


class ChunkedPass:
    """One pass over all chunks: the loss, and the wanted gradients of the sum of `scale * nll`.

    Logits are multiplied and added in fp32. Gradients are multiplied in the type asked for, and those of heads added in
    fp32.

    Args:
        inputs: What the loss is a function of.
        wanted: What to make.
        scale: What each token counts in the gradients; None: 1.
    """

    def __init__(self, inputs: Inputs, wanted: Wanted, scale: Float[Tensor, " M"] | None = None) -> None:
        self.inputs, self.wanted, self.scale = inputs, wanted, scale
        self.vocabulary = min(len(head) for head in inputs.heads)
        self.exact = torch.float64 if torch.float64 in inputs.dtypes else torch.float32
        self.device = inputs.weights.device
        self.heads = [
            head[: self.vocabulary].to(dtype) for head, dtype in zip(inputs.heads, inputs.dtypes, strict=True)
        ]
        self.biases = [None if b is None else b[: self.vocabulary].to(self.exact) for b in inputs.biases]
        # Without a gradient of the hidden states, that of a weight comes from the specialist's own logits, which are
        # there already, and not from `P W_i`: half of the multiplications of stage 1.
        self.kept = [wanted.weights and not hidden for hidden in wanted.hiddens]
        self.any_gradient = wanted.weights or any((*wanted.hiddens, *wanted.heads, *wanted.biases))
        self._memory: dict[object, Tensor] = {}

    @torch.no_grad()
    def run(self) -> tuple[Losses, Gradients]:
        """Go through all chunks."""
        inputs, wanted = self.inputs, self.wanted
        tokens, specialists = inputs.weights.shape
        detailed = tokens if wanted.details else 0
        self.losses = Losses(self._zeros(tokens), self._zeros(detailed).bool(), self._zeros(detailed, specialists))
        self.gradients = Gradients(
            self._zeros(tokens, specialists) if wanted.weights else None,
            [torch.empty_like(h) if w else None for h, w in zip(inputs.hiddens, wanted.hiddens, strict=True)],
            [self._zeros(*h.shape) if w else None for h, w in zip(inputs.heads, wanted.heads, strict=True)],
            [
                self._zeros(len(b)) if b is not None and w else None
                for b, w in zip(inputs.biases, wanted.biases, strict=True)
            ],
        )
        with torch.autocast(self.device.type, enabled=False):  # the types are chosen already
            for start in range(0, tokens, inputs.chunk):
                self._run_chunk(slice(start, start + inputs.chunk))
        self._memory.clear()
        return self.losses, self.gradients

    def _run_chunk(self, rows: slice) -> None:
        target = self.inputs.labels[rows, None]
        mix = self.inputs.weights[rows].to(self.exact)
        hiddens = [h[rows].to(dtype) for h, dtype in zip(self.inputs.hiddens, self.inputs.dtypes, strict=True)]
        own = self._fuse(hiddens, mix, rows)
        logits = self._take("fused", self.exact, len(target))
        if self.inputs.add_others is not None:
            self.inputs.add_others(logits)
        if self.wanted.details:
            self.losses.hit[rows] = logits.argmax(dim=-1) == target[:, 0]
        # In place, so that logits, exponentials and probabilities are one buffer.
        at_label = logits.gather(1, target)
        highest = logits.amax(dim=-1, keepdim=True)
        total = logits.sub_(highest).exp_().sum(dim=-1, keepdim=True)
        self.losses.nll[rows] = (total.log() + highest - at_label)[:, 0]
        if self.any_gradient:
            slope = logits.div_(total)  # dL/dlogits: probabilities, less one at the label
            slope.scatter_add_(1, target, torch.full_like(at_label, -1.0))
            if self.scale is not None:
                slope.mul_(self.scale[rows, None])
            self._add_gradients(slope, own, hiddens, mix, rows)

    def _fuse(self, hiddens: Sequence[Tensor], mix: Tensor, rows: slice) -> dict[int, Tensor]:
        """Fill the buffer of fused logits; gives the specialists' own logits (without bias) where they are kept."""
        kept = {}
        fused = self._take("fused", self.exact, len(mix)).zero_()
        for i, (hidden, head, bias) in enumerate(zip(hiddens, self.heads, self.biases, strict=True)):
            weight = mix[:, i, None]
            hidden = hidden.to(self.exact)
            own = None
            if self.kept[i] or self.wanted.details:
                own = self._take(i if self.kept[i] else "own", self.exact, len(mix))
            else:
                hidden = hidden * weight
            for block in self._blocks():
                # In fp32 for bf16, too: a logit rounded to bf16 moves its probability by percents, and a product of
                # bf16 numbers is exact in fp32.
                columns = head[block].to(self.exact).T
                if own is None:
                    fused[:, block].addmm_(hidden, columns)
                else:
                    torch.mm(hidden, columns, out=own[:, block])
                    fused[:, block].addcmul_(own[:, block], weight)
            if own is not None and self.kept[i]:
                kept[i] = own
            if own is not None and self.wanted.details:
                logits = own if bias is None else own + bias
                target = self.inputs.labels[rows, None]
                self.losses.specialist_nll[rows, i] = logits.logsumexp(dim=-1) - logits.gather(1, target)[:, 0]
            if bias is not None:
                fused.addmm_(weight, bias[None])
        return kept

    def _add_gradients(
        self,
        slope: Tensor,
        own: dict[int, Tensor],
        hiddens: Sequence[Tensor],
        mix: Tensor,
        rows: slice,
    ) -> None:
        gradients = self.gradients
        copied: set[torch.dtype] = set()
        for i, (hidden, head, bias) in enumerate(zip(hiddens, self.heads, self.biases, strict=True)):
            weight = mix[:, i, None]
            low = slope
            if head.dtype != self.exact and (gradients.hiddens[i] is not None or gradients.heads[i] is not None):
                low = self._take("shared", head.dtype, len(mix))
                if head.dtype not in copied:
                    low.copy_(slope)
                    copied.add(head.dtype)
            inner = None  # <dL/dfused, o_i> without the bias
            if (to_hidden := gradients.hiddens[i]) is not None:
                through = low @ head
                to_hidden[rows] = through * weight
                inner = (through.to(self.exact) * hidden).sum(dim=-1)
            elif i in own:
                inner = self._dot(own[i], slope)
            if gradients.weights is not None:
                assert inner is not None
                gradients.weights[rows, i] = inner if bias is None else inner + slope @ bias
            if (to_head := gradients.heads[i]) is not None:
                scaled = (hidden * weight).to(head.dtype)
                if head.dtype == self.exact:
                    to_head[: self.vocabulary].addmm_(low.T, scaled)
                else:
                    to_head[: self.vocabulary].add_(low.T @ scaled)
            if (to_bias := gradients.biases[i]) is not None:
                to_bias[: self.vocabulary].addmv_(slope.T, weight[:, 0])

    def _dot(self, own: Tensor, slope: Tensor) -> Tensor:
        """Row by row; `own` is not needed afterwards."""
        return own.mul_(slope).sum(dim=-1)

    def _blocks(self) -> Iterator[slice]:
        """Parts of the vocabulary whose logits are multiplied at once; all of it where a GPU does so."""
        width = MOST_ROWS_ON_CPU if self.device.type == "cpu" else self.vocabulary
        for start in range(0, self.vocabulary, width):
            yield slice(start, start + width)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.exact, device=self.device)

    def _take(self, use: object, dtype: torch.dtype, rows: int) -> Tensor:
        """A [rows, V] buffer that every chunk uses again: a new one would cost a page fault for each 4 KiB."""
        if (use, dtype) not in self._memory:
            most = min(self.inputs.chunk, len(self.inputs.labels))
            self._memory[use, dtype] = torch.empty(most, self.vocabulary, dtype=dtype, device=self.device)
        return self._memory[use, dtype][:rows]
