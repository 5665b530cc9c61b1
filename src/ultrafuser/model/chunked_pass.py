"""One pass over chunks of tokens: the loss of n linear heads whose logits are added, and its gradients.

The fused logits are one linear map of all hidden states, `sum_i w_i W_i h_i = [W_1|...|W_n] concat(w_i h_i)`, so they
are multiplied into one buffer, without a copy of the heads. A chunk goes through the vocabulary block by block, so that
on a CPU what a product writes is still in the cache when it is used.

Where specialists are frozen (stage 1, evaluation) nothing is kept of a block but sums: `sum_v exp(l_v)` of the fused
logits l for the loss, and `sum_v exp(l_v) o_iv` of the specialists' own logits for the gradient of a weight,
`dL/dw_i = sum_v p_v o_iv - o_iy` for the label y. Each head is multiplied once, and memory does not grow with the
vocabulary. Else the exponentials of a chunk are kept, [C, V], and a second sweep makes the gradients of them.

Shapes: M tokens, C of them in a chunk, N specialists, H hidden size (may differ), V vocabulary, W of it in a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ultrafuser.kernels.bf16 import has_bf16_kernel, multiply_bf16
from ultrafuser.model.loss_sums import Labels, Sums
from ultrafuser.model.loss_terms import Gradients, Inputs, Losses, Wanted, blocks, empty_losses, rows_at_once

# On a CPU a chunk of more tokens is slower and takes more memory (docs/results.md, "Fused loss"); a GPU wants them.
MOST_TOKENS_ON_CPU = 256


class ChunkedPass:
    """One pass over all chunks: the loss, and the wanted gradients of the sum of `scale * nll`.

    Logits are multiplied and added in fp32 (fp64 for fp64 heads). Gradients are multiplied in the type asked for, and
    added in fp32.

    Args:
        inputs: What the loss is a function of.
        wanted: What to make.
        scale: What each token counts in the gradients; None: 1.
    """

    def __init__(self, inputs: Inputs, wanted: Wanted, scale: Float[Tensor, " M"] | None = None) -> None:
        self.inputs, self.wanted, self.scale = inputs, wanted, scale
        self.exact, tokens, specialists = inputs.exact, *inputs.weights.shape
        is_on_cpu, self.is_kept = inputs.device.type == "cpu", wanted.of_specialists
        self.chunk = min(inputs.chunk, MOST_TOKENS_ON_CPU) if is_on_cpu and self.is_kept else inputs.chunk
        width = rows_at_once(is_on_cpu, self.is_kept)
        self.blocks = blocks(inputs.vocabulary, width)
        self.is_weighed = wanted.weights and not self.is_kept
        # Every chunk reads heads twice if specialists are trained: converted once, then.
        self.heads = [
            head.to(dtype) if self.is_kept else head for head, dtype in zip(inputs.heads, inputs.dtypes, strict=True)
        ]
        self.are_narrow = [
            dtype == torch.bfloat16
            and self.exact == torch.float32
            and head.is_contiguous()
            and has_bf16_kernel(head.device)
            for head, dtype in zip(self.heads, inputs.dtypes, strict=True)
        ]
        self.losses = empty_losses(inputs, wanted)
        self.gradients = self._empty_gradients()

        def make_room(count: int) -> list[Tensor]:
            size = min(self.chunk, tokens) * min(width, inputs.vocabulary)
            return [torch.empty(size, dtype=self.exact, device=inputs.device) for _ in range(count)]

        # Used again for every chunk: new memory would cost a page fault for each 4 KiB.
        self._fused = make_room(len(self.blocks) if self.is_kept else 1)
        self._own = make_room(specialists if self.is_weighed or wanted.details else 0)
        self._product = make_room(1)[0] if self.is_weighed or (any(self.are_narrow) and not self._own) else None

    @torch.no_grad()
    def run(self) -> tuple[Losses, Gradients]:
        """Go through all chunks."""
        with torch.autocast(self.inputs.device.type, enabled=False):  # the types are chosen already
            for start in range(0, len(self.inputs.labels), self.chunk):
                self._run_chunk(slice(start, start + self.chunk))
        return self.losses, self.gradients

    def _run_chunk(self, rows: slice) -> None:
        inputs, wanted = self.inputs, self.wanted
        labels, mix = inputs.labels[rows], inputs.weights[rows].to(self.exact)
        hiddens = [h[rows].to(dtype) for h, dtype in zip(inputs.hiddens, inputs.dtypes, strict=True)]
        factors = [self._factor(i, hidden, mix) for i, hidden in enumerate(hiddens)]
        fused = Sums(mix, weighed=self.is_weighed, located=wanted.details)
        alone = [Sums(mix) for _ in hiddens] if wanted.details else []
        for number, block in enumerate(self.blocks):
            logits = _shaped(self._fused[number if self.is_kept else 0], len(mix), block)
            own = [_shaped(room, len(mix), block) for room in self._own]
            product = None if self._product is None else _shaped(self._product, len(mix), block)
            products: list[Tensor | None] = [*own] or [product if is_narrow else None for is_narrow in self.are_narrow]
            self._multiply(factors, mix, block, logits, products)
            here = Labels(labels, block)
            fused.add(logits, here, own, product)
            for own_logits, sums in zip(own, alone, strict=False):
                sums.add(own_logits, here)
        self.losses.nll[rows] = fused.nll
        if wanted.details:
            self.losses.hit[rows] = fused.likeliest == labels
            self.losses.specialist_nll[rows] = torch.stack([sums.nll for sums in alone], dim=-1)
        if self.is_weighed:
            assert self.gradients.weights is not None
            slope = fused.inner / fused.total[:, None] - fused.inner_at_label
            self.gradients.weights[rows] = slope if self.scale is None else slope * self.scale[rows, None]
        if self.is_kept:
            self._add_gradients(fused, hiddens, mix, rows)

    def _factor(self, i: int, hidden: Tensor, mix: Tensor) -> Tensor:
        """What a head is multiplied by: weighed already where nobody needs the specialist's own logits."""
        if self.are_narrow[i]:
            return hidden
        exact = hidden.to(self.exact)
        return exact if self._own else exact * mix[:, i, None]

    def _multiply(
        self, factors: Sequence[Tensor], mix: Tensor, block: slice, fused: Tensor, products: Sequence[Tensor | None]
    ) -> None:
        """Fill a block with the fused logits [C, W], over the products of those specialists that have room for one."""
        inputs = self.inputs
        for i, (factor, head, bias, dtype) in enumerate(
            zip(factors, self.heads, inputs.biases, inputs.dtypes, strict=True)
        ):
            # In fp32 for bf16, too: a logit rounded to bf16 moves its probability by percents, and a product of bf16
            # numbers is exact in fp32.
            weight, rows, product = mix[:, i, None], head[block].to(dtype), products[i]
            if product is None:
                torch.addmm(fused, factor, rows.to(self.exact).T, beta=1 if i else 0, out=fused)
                if bias is not None:
                    fused.addcmul_(weight, bias[block].to(self.exact))
                continue
            if self.are_narrow[i]:
                multiply_bf16(factor, rows, product)
            else:
                torch.mm(factor, rows.to(self.exact).T, out=product)
            if bias is not None:
                product.add_(bias[block].to(self.exact))
            if i:
                fused.addcmul_(product, weight)
            else:
                torch.mul(product, weight, out=fused)
        if inputs.add_others is not None:
            inputs.add_others(fused)

    def _add_gradients(self, sums: Sums, hiddens: Sequence[Tensor], mix: Tensor, rows: slice) -> None:
        """The second sweep: gradients of a chunk whose exponentials are kept, each over its peak."""
        inputs, gradients = self.inputs, self.gradients
        scale = None if self.scale is None else self.scale[rows].to(self.exact)
        count = 1 / sums.total if scale is None else scale / sums.total
        scaled = [
            (h * mix[:, i, None]).to(dtype) for i, (h, dtype) in enumerate(zip(hiddens, inputs.dtypes, strict=True))
        ]
        through = [  # <dL/dlogits, W_i>, which the gradients of hidden states and of weights are made of
            torch.zeros_like(h, dtype=self.exact) if to_hidden is not None or gradients.weights is not None else None
            for h, to_hidden in zip(hiddens, gradients.hiddens, strict=True)
        ]
        inner = torch.zeros_like(mix)  # the part of biases in <dL/dlogits, o_i>
        for block, room, peak in zip(self.blocks, self._fused, sums.peaks, strict=True):
            slope = _shaped(room, len(mix), block)  # dL/dlogits: probabilities, less one at the label
            slope.mul_(((peak - sums.highest).exp_() * count)[:, None])
            here = Labels(inputs.labels[rows], block)
            less = here.is_here.to(self.exact) if scale is None else here.is_here * scale
            slope.scatter_add_(1, here.columns, -less[:, None])
            low = {dtype: slope.to(dtype) for dtype in inputs.dtypes}
            for i, (head, bias, dtype) in enumerate(zip(self.heads, inputs.biases, inputs.dtypes, strict=True)):
                if (total := through[i]) is not None:
                    _add_product(total, low[dtype], head[block])
                if bias is not None:
                    inner[:, i].addmv_(slope, bias[block].to(self.exact))
                if (to_head := gradients.heads[i]) is not None:
                    _add_product(to_head[block], low[dtype].T, scaled[i])
                if (to_bias := gradients.biases[i]) is not None:
                    to_bias[block].addmv_(slope.T, mix[:, i])
        for i, total in enumerate(through):
            if (to_hidden := gradients.hiddens[i]) is not None and total is not None:
                to_hidden[rows] = total * mix[:, i, None]
            if gradients.weights is not None and total is not None:
                gradients.weights[rows, i] = (total * hiddens[i]).sum(dim=-1) + inner[:, i]

    def _empty_gradients(self) -> Gradients:
        inputs, wanted = self.inputs, self.wanted

        def zeros(like: Tensor) -> Tensor:
            return torch.zeros_like(like, dtype=self.exact, memory_format=torch.contiguous_format)

        return Gradients(
            zeros(inputs.weights) if wanted.weights else None,
            [torch.empty_like(h) if w else None for h, w in zip(inputs.hiddens, wanted.hiddens, strict=True)],
            [zeros(h) if w else None for h, w in zip(inputs.heads, wanted.heads, strict=True)],
            [zeros(b) if b is not None and w else None for b, w in zip(inputs.biases, wanted.biases, strict=True)],
        )


def _shaped(room: Tensor, rows: int, block: slice) -> Tensor:
    """The beginning of some memory as [C, W]."""
    width = block.stop - block.start
    return room[: rows * width].view(rows, width)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product to a sum that may be of a larger type."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
