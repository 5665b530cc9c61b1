"""One pass over chunks of tokens: the loss of n linear heads whose logits are added, and gradients of the specialists.

The fused logits are one linear map of all hidden states, `sum_i w_i W_i h_i = [W_1|...|W_n] concat(w_i h_i)`, so their
loss needs one buffer of [C, V]: no logits per specialist, no copy of the heads.

Shapes: M tokens, C of them in a chunk, N specialists, H hidden size (may differ), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ultrafuser.model import loss_terms
from ultrafuser.model.loss_terms import Gradients, Inputs, Losses, Wanted, blocks, empty_losses

# On a CPU a chunk of more tokens is slower and takes more memory (docs/results.md, "Fused loss"); a GPU wants them.
MOST_TOKENS_ON_CPU = 256


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
        self.vocabulary, self.exact, self.device = inputs.vocabulary, inputs.exact, inputs.device
        is_on_cpu = self.device.type == "cpu"
        self.chunk = min(inputs.chunk, MOST_TOKENS_ON_CPU) if is_on_cpu else inputs.chunk
        self.width = loss_terms.MOST_ROWS_ON_CPU if is_on_cpu else self.vocabulary
        self.heads = [
            head[: self.vocabulary].to(dtype) for head, dtype in zip(inputs.heads, inputs.dtypes, strict=True)
        ]
        self.biases = [None if b is None else b[: self.vocabulary].to(self.exact) for b in inputs.biases]
        self._memory: dict[object, Tensor] = {}

    @torch.no_grad()
    def run(self) -> tuple[Losses, Gradients]:
        """Go through all chunks."""
        inputs, wanted = self.inputs, self.wanted
        tokens, specialists = inputs.weights.shape
        self.losses = empty_losses(inputs, wanted)
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
            for start in range(0, tokens, self.chunk):
                self._run_chunk(slice(start, start + self.chunk))
        self._memory.clear()
        return self.losses, self.gradients

    def _run_chunk(self, rows: slice) -> None:
        target = self.inputs.labels[rows, None]
        mix = self.inputs.weights[rows].to(self.exact)
        hiddens = [h[rows].to(dtype) for h, dtype in zip(self.inputs.hiddens, self.inputs.dtypes, strict=True)]
        self._fuse(hiddens, mix, rows)
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
        slope = logits.div_(total)  # dL/dlogits: probabilities, less one at the label
        slope.scatter_add_(1, target, torch.full_like(at_label, -1.0))
        if self.scale is not None:
            slope.mul_(self.scale[rows, None])
        self._add_gradients(slope, hiddens, mix, rows)

    def _fuse(self, hiddens: Sequence[Tensor], mix: Tensor, rows: slice) -> None:
        """Fill the buffer of fused logits."""
        fused = self._take("fused", self.exact, len(mix)).zero_()
        for i, (hidden, head, bias) in enumerate(zip(hiddens, self.heads, self.biases, strict=True)):
            weight = mix[:, i, None]
            hidden = hidden.to(self.exact)
            own = self._take("own", self.exact, len(mix)) if self.wanted.details else None
            if own is None:
                hidden = hidden * weight
            for block in blocks(self.vocabulary, self.width):
                # In fp32 for bf16, too: a logit rounded to bf16 moves its probability by percents, and a product of
                # bf16 numbers is exact in fp32.
                columns = head[block].to(self.exact).T
                if own is None:
                    fused[:, block].addmm_(hidden, columns)
                else:
                    torch.mm(hidden, columns, out=own[:, block])
                    fused[:, block].addcmul_(own[:, block], weight)
            if own is not None:
                logits = own if bias is None else own + bias
                target = self.inputs.labels[rows, None]
                self.losses.specialist_nll[rows, i] = logits.logsumexp(dim=-1) - logits.gather(1, target)[:, 0]
            if bias is not None:
                fused.addmm_(weight, bias[None])

    def _add_gradients(
        self,
        slope: Tensor,
        hiddens: Sequence[Tensor],
        mix: Tensor,
        rows: slice,
    ) -> None:
        gradients = self.gradients
        copied: set[torch.dtype] = set()
        for i, (hidden, head, bias) in enumerate(zip(hiddens, self.heads, self.biases, strict=True)):
            weight = mix[:, i, None]
            to_hidden = gradients.hiddens[i]
            low = slope
            if head.dtype != self.exact:
                low = self._take("shared", head.dtype, len(mix))
                if head.dtype not in copied:
                    low.copy_(slope)
                    copied.add(head.dtype)
            if to_hidden is not None or gradients.weights is not None:
                through = low @ head
                if to_hidden is not None:
                    to_hidden[rows] = through * weight
                if gradients.weights is not None:  # <dL/dfused, o_i>
                    inner = (through.to(self.exact) * hidden).sum(dim=-1)
                    gradients.weights[rows, i] = inner if bias is None else inner + slope @ bias
            if (to_head := gradients.heads[i]) is not None:
                scaled = (hidden * weight).to(head.dtype)
                if head.dtype == self.exact:
                    to_head[: self.vocabulary].addmm_(low.T, scaled)
                else:
                    to_head[: self.vocabulary].add_(low.T @ scaled)
            if (to_bias := gradients.biases[i]) is not None:
                to_bias[: self.vocabulary].addmv_(slope.T, weight[:, 0])

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.exact, device=self.device)

    def _take(self, use: object, dtype: torch.dtype, rows: int) -> Tensor:
        """A [rows, V] buffer that every chunk uses again: a new one would cost a page fault for each 4 KiB."""
        if (use, dtype) not in self._memory:
            most = min(self.chunk, len(self.inputs.labels))
            self._memory[use, dtype] = torch.empty(most, self.vocabulary, dtype=dtype, device=self.device)
        return self._memory[use, dtype][:rows]
