"""One pass over blocks of the vocabulary: the loss of n linear heads whose logits are added, specialists being frozen.

Of the specialists' logits `o_i` nothing is kept but sums that grow from block to block, rescaled whenever a larger
logit comes (the online softmax of Milakov and Gimelshein, 2018): `sum_v exp(l_v)` of the fused logits `l` for the loss,
and `sum_v exp(l_v) o_iv` for the gradient of a weight, `dL/dw_i = sum_v p_v o_iv - o_iy` for the label y. So each head
is multiplied once, and memory does not grow with the vocabulary.

Shapes: M tokens, C of them in a chunk, N specialists, V vocabulary, W of it in a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ultrafuser.model import loss_terms
from ultrafuser.model.loss_terms import Gradients, Inputs, Losses, Wanted, blocks, empty_losses

MOST_ROWS_ON_GPU = 16_384  # of a head in one product


class StreamedPass:
    """One pass: the loss, and the gradient of the gate weights if it is wanted.

    Logits are multiplied and added in fp32 (fp64 for fp64 heads).

    Args:
        inputs: What the loss is a function of.
        wanted: What to make; no gradient of a specialist.
        scale: What each token counts in the gradients; None: 1.
    """

    def __init__(self, inputs: Inputs, wanted: Wanted, scale: Float[Tensor, " M"] | None = None) -> None:
        self.inputs, self.wanted, self.scale = inputs, wanted, scale
        self.tokens, self.specialists = inputs.weights.shape
        on_cpu = inputs.device.type == "cpu"
        self.width = min(inputs.vocabulary, loss_terms.MOST_ROWS_ON_CPU if on_cpu else MOST_ROWS_ON_GPU)
        self.needs_own = wanted.weights or wanted.details
        # Blocks that are used again and again: fused logits, the specialists' own, and one to multiply into.
        count = 2 + self.specialists if self.needs_own else 1
        room = min(inputs.chunk, self.tokens) * self.width
        self._memory = [torch.empty(room, dtype=inputs.exact, device=inputs.device) for _ in range(count)]

    @torch.no_grad()
    def run(self) -> tuple[Losses, Gradients]:
        """Go through all chunks."""
        nothing = [None] * self.specialists
        self.losses = empty_losses(self.inputs, self.wanted)
        slope = self.losses.nll.new_zeros(self.tokens, self.specialists) if self.wanted.weights else None
        self.gradients = Gradients(slope, nothing, nothing, nothing)
        with torch.autocast(self.inputs.device.type, enabled=False):  # the types are chosen already
            for start in range(0, self.tokens, self.inputs.chunk):
                self._run_chunk(slice(start, start + self.inputs.chunk))
        return self.losses, self.gradients

    def _run_chunk(self, rows: slice) -> None:
        inputs, wanted = self.inputs, self.wanted
        mix = inputs.weights[rows].to(inputs.exact)
        hiddens = [h[rows].to(dtype).to(inputs.exact) for h, dtype in zip(inputs.hiddens, inputs.dtypes, strict=True)]
        if not self.needs_own:
            hiddens = [hidden * mix[:, i, None] for i, hidden in enumerate(hiddens)]
        labels = inputs.labels[rows]
        fused = _Sums(mix, weighed=self.specialists if wanted.weights else 0)
        alone = [_Sums(mix) for _ in hiddens] if wanted.details else []
        likeliest = labels.new_zeros(len(labels))
        for block in blocks(inputs.vocabulary, self.width):
            width = block.stop - block.start
            logits, *others = (room[: len(mix) * width].view(-1, width) for room in self._memory)
            own = others[:-1]
            self._multiply(hiddens, mix, block, logits, own)
            if wanted.details:
                highest, at = logits.max(dim=-1)
                likeliest = torch.where(highest > fused.highest, at + block.start, likeliest)
            here = _Labels(labels, block.start, width)
            fused.add(logits, here, own, *others[-1:])
            for own_logits, sums in zip(own, alone, strict=False):
                sums.add(own_logits, here)
        self.losses.nll[rows] = fused.nll
        if wanted.details:
            self.losses.hit[rows] = likeliest == labels
            self.losses.specialist_nll[rows] = torch.stack([sums.nll for sums in alone], dim=-1)
        if self.gradients.weights is not None:
            slope = fused.inner / fused.total[:, None] - fused.inner_at_label
            self.gradients.weights[rows] = slope if self.scale is None else slope * self.scale[rows, None]

    def _multiply(self, hiddens: list[Tensor], mix: Tensor, block: slice, fused: Tensor, own: Sequence[Tensor]) -> None:
        """Fill a block with the fused logits [C, W], and those of each specialist if there is room for them."""
        inputs = self.inputs
        for i, (hidden, head, bias, dtype) in enumerate(
            zip(hiddens, inputs.heads, inputs.biases, inputs.dtypes, strict=True)
        ):
            # In fp32 for bf16, too: a logit rounded to bf16 moves its probability by percents, and a product of bf16
            # numbers is exact in fp32.
            columns = head[block].to(dtype).to(inputs.exact).T
            weight = mix[:, i, None]
            if not own:
                torch.addmm(fused, hidden, columns, beta=1 if i else 0, out=fused)
                if bias is not None:
                    fused.addcmul_(weight, bias[block].to(inputs.exact))
                continue
            torch.mm(hidden, columns, out=own[i])
            if bias is not None:
                own[i].add_(bias[block].to(inputs.exact))
            if i:
                fused.addcmul_(own[i], weight)
            else:
                torch.mul(own[i], weight, out=fused)
        if inputs.add_others is not None:
            inputs.add_others(fused)


class _Labels:
    """Where the labels stand in a block, for those rows whose label is in it."""

    def __init__(self, labels: Tensor, start: int, width: int) -> None:
        self.is_here = (labels >= start) & (labels < start + width)
        self.columns = (labels - start).clamp(0, width - 1)[:, None]

    def read(self, logits: Tensor, before: Tensor) -> Tensor:
        """What stands at the labels [C]; what was known `before` for rows whose label is elsewhere."""
        return torch.where(self.is_here, logits.gather(1, self.columns)[:, 0], before)


class _Sums:
    """Sums over the vocabulary, for each row of a chunk.

    Attributes:
        highest: Largest logit yet.
        total: `sum exp(l - highest)`.
        at_label: Logit of the label.
        inner: `sum exp(l - highest) o_i` for each specialist i, [C, N], if wanted; `inner_at_label`: o_i of the label.
    """

    def __init__(self, like: Tensor, *, weighed: int = 0) -> None:
        zeros = like.new_zeros(len(like))
        self.highest = torch.full_like(zeros, -torch.inf)
        self.total, self.at_label = zeros, zeros
        self.inner, self.inner_at_label = like.new_zeros(2, len(like), weighed)

    def add(self, logits: Tensor, labels: _Labels, own: Sequence[Tensor] = (), product: Tensor | None = None) -> None:
        """Take in a block; its logits become exponentials. `product` is room for another block."""
        self.at_label = labels.read(logits, self.at_label)
        highest = torch.maximum(self.highest, logits.amax(dim=-1))
        shrink = (self.highest - highest).exp_()
        exponentials = logits.sub_(highest[:, None]).exp_()
        self.total = self.total * shrink + exponentials.sum(dim=-1)
        self.highest = highest
        if self.inner.shape[1]:
            self.inner.mul_(shrink[:, None])
            for i, each in enumerate(own):
                self.inner[:, i] += torch.mul(each, exponentials, out=product).sum(dim=-1)
                self.inner_at_label[:, i] = labels.read(each, self.inner_at_label[:, i])

    @property
    def nll(self) -> Tensor:
        """Negative log-likelihood of the labels [C]."""
        return self.total.log() + self.highest - self.at_label
