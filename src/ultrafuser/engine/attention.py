"""Attention of Llama-like layers over a slot cache, by torch's operations: any number of rows, on any device.

Shapes: G specialists that run, B choices, T new tokens, R = B * G rows of the cache, Q query heads, K key-value heads,
D head size, L columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ultrafuser.engine.slots import SlotView


class Heads(NamedTuple):
    """Whose heads read in one forward, and what they see.

    Attributes:
        num_members: G.
        num_heads, num_kv_heads: Q and K.
        window: Columns that a token sees, itself included; None for all.
    """

    num_members: int
    num_heads: int
    num_kv_heads: int
    window: int | None


class TorchAttention:
    """Attention of one forward; `passes.py` has the same by our own kernel.

    Args:
        view: Rows of the cache.
        cosines, sines: [positions, D], the sine with the sign of the rotation.
        heads: Whose.
    """

    def __init__(self, view: SlotView, cosines: Tensor, sines: Tensor, heads: Heads) -> None:
        self.view = view
        self.num_members, self.num_heads, self.num_kv_heads, _ = heads
        num_heads, num_kv_heads = self.num_heads, self.num_kv_heads
        self.places = view.places(num_kv_heads)  # of new columns
        self.mask = self._mask(heads.window, cosines.dtype)
        # For the heads of query, key and value; values are not turned.
        shape = (*view.positions.shape, num_heads + 2 * num_kv_heads, cosines.shape[-1])
        self.cos, self.sin = (
            table[view.positions][:, :, None].expand(shape).clone() for table in (cosines, sines)
        )  # [R, T, heads, D]
        self.cos[:, :, -num_kv_heads:] = 1
        self.sin[:, :, -num_kv_heads:] = 0

    def __call__(self, layer: int, qkv: Float[Tensor, "G M _"]) -> Float[Tensor, "G M _"]:
        """Queries, keys and values [G, B * T, (Q + 2 K) * D] of a layer to what is read [G, B * T, Q * D]."""
        num_new, num_rows, num_members = self.view.num_new, len(self.view.row_ids), self.num_members
        num_q, num_kv, size = self.num_heads, self.num_kv_heads, self.cos.shape[-1]
        # [G, B * T, heads * D] -> [R, T, heads, D], members varying fastest
        qkv = qkv.view(num_members, num_rows // num_members, num_new, num_q + 2 * num_kv, size)
        qkv = qkv.transpose(0, 1).reshape(num_rows, num_new, num_q + 2 * num_kv, size)
        turned = torch.addcmul(qkv * self.cos, qkv.roll(size // 2, dims=-1), self.sin)
        self.view.write_at(layer, self.places, turned[:, :, num_q:])
        keys, values = (kept.to(qkv.dtype) for kept in self.view.read(layer))
        q = turned[:, :, :num_q].transpose(1, 2)
        if self.mask is None and num_new > 1:  # the beginning of a text
            y = F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=num_q != num_kv)
        else:
            # The query heads that share a key stand in for further tokens, so keys need not be repeated.
            folded = q.reshape(num_rows, num_kv, num_q // num_kv * num_new, size)
            y = F.scaled_dot_product_attention(folded, keys, values, attn_mask=self.mask)
            y = y.reshape(num_rows, num_q, num_new, size)
        y = y.transpose(1, 2).reshape(num_rows // num_members, num_members, num_new, num_q * size)
        return y.transpose(0, 1).reshape(num_members, -1, num_q * size)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to scores [R, 1, share * T, L]; None for the beginning of a text, or where all is seen."""
        num_new = self.view.num_new
        if self.view.single == 0 and num_new > 1 and (window is None or num_new <= window):
            return None
        seen = self.view.mask(window)
        if seen is None:
            return None
        # Once for all layers: each would make it of what is seen.
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
        return mask if num_new == 1 else mask.repeat(1, 1, self.num_heads // self.num_kv_heads, 1)
