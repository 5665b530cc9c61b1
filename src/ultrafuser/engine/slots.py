"""SlotCache: keys and values of every running choice, a slot each, for one group of specialists.

The specialists of a group lie side by side within a slot, so the first B slots are one slice of the storage, however
many they are. A slot is never cleared: what lies behind a choice's own length is overwritten before it is seen.

Shapes: G specialists of the group, S slots, K key-value heads, L columns of a slot, D head size, B choices, T new
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


class SlotCache:
    """Storage of one group.

    Args:
        num_members: G.
        num_slots: S.
        length: L.
        heads: K and D of each layer; None where a layer keeps nothing.
        dtype, device: Of the storage. On the CPU untouched columns take no memory.
    """

    def __init__(
        self,
        num_members: int,
        num_slots: int,
        length: int,
        heads: Sequence[tuple[int, int]],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_members, self.num_slots, self.length = num_members, num_slots, length
        shapes = [(2, num_slots * num_members, num_heads, length, size) for num_heads, size in heads]
        self._layers = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.keys = [storage[0] for storage in self._layers]
        self.values = [storage[1] for storage in self._layers]

    @property
    def bytes_per_token(self) -> int:
        """Of one token in the caches of all members."""
        per_layer = (2 * k.shape[1] * k.shape[3] * k.element_size() for k in self.keys)
        return self.num_members * sum(per_layer)

    def rows_of(self, layer: int) -> Float[Tensor, "rows D"]:
        """Keys, then values of a layer, a row of the result for each slot, member, head and column."""
        return self._layers[layer].view(-1, self._layers[layer].shape[-1])

    def clear(self, slot: int) -> None:
        """Forget what a slot holds: numbers that are none would spoil the next choice, though it never sees them."""
        for storage in (*self.keys, *self.values):
            storage[slot * self.num_members : (slot + 1) * self.num_members].zero_()

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of one slot to another."""
        n = self.num_members
        for storage in (*self.keys, *self.values):
            storage[target * n : (target + 1) * n, :, :length] = storage[source * n : (source + 1) * n, :, :length]


class SlotView:
    """The rows of a slot cache that one forward reads and writes: B choices of one or all members.

    Args:
        cache: The storage.
        slots: Slots of the B choices, in the order of the rows.
        member: One member's rows, or None for all, members varying fastest.
        starts: Columns that each row holds already, [R] with R = B or B * G.
        num_new: T, new columns of every row; for shorter rows what follows is rubbish that nobody sees.
    """

    def __init__(
        self, cache: SlotCache, slots: Sequence[int], member: int | None, starts: Int[Tensor, " R"], num_new: int
    ) -> None:
        self.cache = cache
        n = cache.num_members
        device = starts.device
        adjacent = list(slots) == list(range(slots[0], slots[0] + len(slots)))
        if adjacent:
            first, step = (slots[0] * n, 1) if member is None else (slots[0] * n + member, n)
            self.rows: slice | Tensor = slice(first, (slots[0] + len(slots)) * n, step)
            self.row_ids = torch.arange(first, (slots[0] + len(slots)) * n, step, device=device)
        else:
            base = torch.tensor(list(slots), device=device) * n
            members = torch.arange(n, device=device) if member is None else torch.tensor([member], device=device)
            self.row_ids = (base[:, None] + members).flatten()
            self.rows = self.row_ids
        self.num_new = num_new
        self.starts: Tensor | None = starts  # None where one forward is repeated for others
        self.positions = starts[:, None] + torch.arange(num_new, device=device)  # [R, T]
        self.stop = int(starts.max()) + num_new
        self.single = int(starts[0]) if len(starts) == 1 else None

    def write(self, layer: int, keys: Float[Tensor, "R K T D"], values: Float[Tensor, "R K T D"]) -> None:
        """Store new columns."""
        store_k, store_v = self.cache.keys[layer], self.cache.values[layer]
        if self.single is not None:
            row, start = int(self.row_ids[0]), self.single
            store_k[row, :, start : start + self.num_new] = keys[0]
            store_v[row, :, start : start + self.num_new] = values[0]
            return
        store_k[self.row_ids[:, None], :, self.positions] = keys.transpose(1, 2)
        store_v[self.row_ids[:, None], :, self.positions] = values.transpose(1, 2)

    def places(self, num_heads: int) -> Int[Tensor, " places"]:
        """Where new columns belong in `SlotCache.rows_of` a layer of so many heads, as `write_at` takes them."""
        device, num_rows = self.positions.device, self.cache.num_members * self.cache.num_slots
        rows = self.row_ids[:, None] + torch.arange(2, device=device) * num_rows  # of keys, of values
        heads = (rows * num_heads)[..., None] + torch.arange(num_heads, device=device)
        return (heads.view(len(rows), 1, -1) * self.cache.length + self.positions[..., None]).view(-1)

    def write_at(self, layer: int, places: Int[Tensor, " places"], heads: Float[Tensor, "R T heads D"]) -> None:
        """Store new columns as they come from one product, keys and values side by side: one operation."""
        rows = self.cache.rows_of(layer)
        rows.index_copy_(0, places, heads.reshape(-1, heads.shape[-1]).to(rows.dtype))

    def read(self, layer: int) -> tuple[Float[Tensor, "R K L D"], Float[Tensor, "R K L D"]]:
        """All columns up to the longest row's last one."""
        return (
            self.cache.keys[layer][self.rows][:, :, : self.stop],
            self.cache.values[layer][self.rows][:, :, : self.stop],
        )

    def mask(self, window: int | None = None) -> Tensor | None:
        """True where a new token sees a column, [R, 1, T, L]; None where a single token sees all."""
        if self.single is not None and self.num_new == 1 and (window is None or self.stop <= window):
            return None
        columns = torch.arange(self.stop, device=self.positions.device)
        seen = columns <= self.positions[:, None, :, None]
        if window is not None:
            seen &= columns > self.positions[:, None, :, None] - window
        return seen
