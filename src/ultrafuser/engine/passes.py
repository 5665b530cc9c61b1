"""Whole passes of few rows through stacks of Llama-like models: one call of our own kernel (`native.py`).

What stands between products costs next to nothing then, where torch's operations and Python's calls take more time than
the arithmetic. All in fp32 on the CPU, with rows rounded where `few_rows.py` says. What a row becomes is the same to
the bit whatever other rows there are and however many threads.

Shapes: G specialists, M rows of each, R ranks of all specialists together, H hidden size, F inner size, B choices, T
new tokens, Q query heads, K key-value heads, D head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ultrafuser.engine.few_rows import Adapters, Matrix, are_few, are_units, check_plain, make_room, own, rounds
from ultrafuser.engine.slots import SlotCache, SlotView
from ultrafuser.kernels import native
from ultrafuser.kernels.native import KINDS, MOST_UPS, kernels

_LANES = 8
_LARGEST_HEAD = 256


class LayerWeights(NamedTuple):
    """One layer. Norms are [G, 1, H], or [1, 1, H] where all share them; those of heads are for D."""

    qkv: Matrix
    out: Matrix
    gate_up: Matrix
    down: Matrix
    norm_in: Tensor
    norm_mlp: Tensor
    norm_q: Tensor | None = None
    norm_k: Tensor | None = None


class Shape(NamedTuple):
    """Of a stack: Q, K, D, H, F, the window of attention (None for all columns) and the epsilon of norms."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    inner_size: int
    window: int | None
    eps: float


class Layers:
    """All layers of a stack of Llama-like models, a call a pass.

    Args:
        layers: Their weights, which must not move.
        norm_out: Of the last norm, [G or 1, 1, H].
        cosines, sines: [positions, D], the sine with the sign of the rotation.
        shape: Of the stack.
        num_members: G.
        num_threads: Of torch.

    Raises:
        ValueError: Shapes or types do not fit.
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        norm_out: Tensor,
        cosines: Float[Tensor, "positions D"],
        sines: Float[Tensor, "positions D"],
        shape: Shape,
        *,
        num_members: int,
        num_threads: int,
    ) -> None:
        self.layers, self.norm_out, self.cosines, self.sines = list(layers), norm_out, cosines, sines
        self.shape, self.num_members, self.num_threads = shape, num_members, num_threads
        self.is_shared = layers[0].qkv.weight.shape[0] < num_members
        check_plain((norm_out, cosines, sines))
        for layer in layers:
            _check_layer(layer, shape, num_members, 1 if self.is_shared else num_members)
        self.num_norms = len(norm_out)
        heads = shape.num_heads + 2 * shape.num_kv_heads
        self._wide = max(heads * shape.head_size, 2 * shape.inner_size)
        self._narrow = max(shape.num_heads * shape.head_size, shape.inner_size)
        matrices = [matrix for layer in layers for matrix in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        self._room = max((len(m.adapters.down) for m in matrices if m.adapters is not None), default=0)
        kinds = {m.weight.dtype for m in matrices} | {m.adapters.down.dtype for m in matrices if m.adapters is not None}
        self._rounded = max(m.weight.shape[2] for m in matrices) if torch.bfloat16 in kinds else 0
        self._tables: dict[int | None, ctypes.Array[native.Layer]] = {}
        self._ranks: list[ctypes.Array[native.Ranks]] = []
        self._cache: SlotCache | None = None  # of the last pass

    def takes(self, view: SlotView, num_members: int, num_rows: int) -> bool:
        """Whether so many rows of each of these members are few, and of a cache that the kernel knows."""
        together = num_rows * num_members if self.is_shared else num_rows
        dtype = view.cache.keys[0].dtype
        return are_few(together) and view.starts is not None and (dtype == torch.float32 or rounds(dtype))

    def __call__(self, x: Float[Tensor, "G M H"], view: SlotView, member: int | None = None) -> Float[Tensor, "G M H"]:
        """Embedded tokens to last hidden states; keys and values join the cache.

        Args:
            x: Of all members or one.
            view: Rows of the cache.
            member: The one that runs, or None for all.

        Raises:
            ValueError: A row would be written or read beyond its slot or the tables.
        """
        num_members = self.num_members if member is None else 1
        num_rows = len(view.row_ids) // num_members * view.num_new
        self._check_view(view, num_members)
        if x.shape != (num_members, num_rows, self.shape.hidden_size):
            raise ValueError(f"{num_rows} rows of {num_members} specialists are no {tuple(x.shape)}")
        check_plain((x,))
        assert view.starts is not None
        rows, starts = view.row_ids.contiguous(), view.starts.contiguous()
        y = torch.empty_like(x)
        hidden_size = self.shape.hidden_size
        sizes = (self._wide, self._narrow, hidden_size, self._room, 2 * self.num_threads * hidden_size)
        wide, narrow, told, room, own_rows = (torch.empty(num_members * num_rows * size) for size in sizes)
        scores = torch.empty(self.num_threads * (view.cache.length + _LANES))
        rounded = make_room(self.num_threads, num_members * num_rows * self._rounded)
        shares = torch.empty((self.num_threads, 2 * num_members * num_rows * self._room))
        keys, values = self._addresses(view.cache)
        shape, norms = self.shape, self.num_norms if member is None else 1
        attention = native.Attention(
            cosines=self.cosines.data_ptr(),
            sines=self.sines.data_ptr(),
            rows=rows.data_ptr(),
            starts=starts.data_ptr(),
            scores=scores.data_ptr(),
            num_members=num_members,
            num_choices=len(rows) // num_members,
            num_new=view.num_new,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            size=shape.head_size,
            length=view.cache.length,
            window=shape.window or 0,
            norm_members=norms,
            kind=KINDS[view.cache.keys[0].dtype],
            eps=shape.eps,
        )
        whole = native.Pass(
            layers=ctypes.addressof(self._table(member)),
            norm_out=own(self.norm_out, member).data_ptr(),
            keys=ctypes.addressof(keys),
            values=ctypes.addressof(values),
            x=x.data_ptr(),
            y=y.data_ptr(),
            wide=wide.data_ptr(),
            narrow=narrow.data_ptr(),
            told=told.data_ptr(),
            room=room.data_ptr(),
            own=own_rows.data_ptr(),
            attention=attention,
            rounded=rounded.data_ptr(),
            num_rounded=rounded.shape[1],
            shares=shares.data_ptr(),
            num_shares=shares.shape[1],
            num_layers=len(self.layers),
            hidden_size=shape.hidden_size,
            norm_members=norms,
            eps=shape.eps,
        )
        kernels().run(ctypes.byref(whole), self.num_threads)
        return y

    def _check_view(self, view: SlotView, num_members: int) -> None:
        cache, shape = view.cache, self.shape
        if view.stop > min(cache.length, len(self.cosines)) or len(view.row_ids) % num_members:
            raise ValueError(f"{view.stop} columns do not fit a slot of {cache.length} and {len(self.cosines)} turns")
        rows = cache.num_slots * cache.num_members
        is_known = view.row_ids.dtype == torch.int64 and view.starts is not None and view.starts.dtype == torch.int64
        if not is_known or int(view.row_ids.max()) >= rows or int(view.row_ids.min()) < 0:
            raise ValueError(f"rows {view.row_ids.tolist()} are not all among the {rows} of the cache")
        wanted = (rows, shape.num_kv_heads, cache.length, shape.head_size)
        if len(cache.keys) != len(self.layers) or cache.keys[0].shape != wanted:
            raise ValueError(f"a cache {tuple(cache.keys[0].shape)} of {len(cache.keys)} layers is no {wanted}")

    def _addresses(self, cache: SlotCache) -> tuple[ctypes.Array[ctypes.c_void_p], ctypes.Array[ctypes.c_void_p]]:
        """Where keys and values of each layer are."""
        if cache is not self._cache:
            check_plain((*cache.keys, *cache.values), cache.keys[0].dtype)
            many = ctypes.c_void_p * len(cache.keys)
            self._keys, self._values = (
                many(*(storage.data_ptr() for storage in storages)) for storages in (cache.keys, cache.values)
            )
            self._cache = cache
        return self._keys, self._values

    def _table(self, member: int | None) -> ctypes.Array[native.Layer]:
        """The layers, of all members or one."""
        if (table := self._tables.get(member)) is None:
            table = (native.Layer * len(self.layers))()
            for row, layer in zip(table, self.layers, strict=True):
                for name in ("qkv", "out", "gate_up", "down"):
                    setattr(row, name, self._structure(getattr(layer, name), member))
                for name in ("norm_in", "norm_mlp", "norm_q", "norm_k"):
                    weight = getattr(layer, name)
                    setattr(row, name, None if weight is None else own(weight, member).data_ptr())
            self._tables[member] = table
        return table

    def _structure(self, matrix: Matrix, member: int | None) -> native.Matrix:
        """What the kernel reads, of all members or one."""
        weight = own(matrix.weight, member)
        _, num_out, num_in = weight.shape
        found = native.Matrix(
            weight=weight.data_ptr(),
            units=None if matrix.units is None else own(matrix.units, member).data_ptr(),
            bias=None if matrix.bias is None else own(matrix.bias, member).data_ptr(),
            members=len(weight),
            num_in=num_in,
            num_out=num_out,
            kind=KINDS[weight.dtype],
        )
        if matrix.adapters is not None:
            down, ups, scales = matrix.adapters
            found.down, found.scales = down.data_ptr(), scales.data_ptr()
            found.num_ranks, found.num_ups, found.adapter_kind = len(down), len(ups), KINDS[down.dtype]
            for place, up in zip(found.ups, ups, strict=False):
                chosen = up.own if member is None else up.own[member : member + 1]
                ranks = (native.Ranks * len(chosen))(*(native.Ranks(r.start, r.stop - r.start) for r in chosen))
                self._ranks.append(ranks)  # of which the kernel is told the address alone
                num_out, num_ranks = up.weight.shape
                place.weight, place.own = up.weight.data_ptr(), ctypes.addressof(ranks)
                place.first_out, place.num_out = up.outputs.start, num_out
                place.first_rank, place.num_ranks = up.ranks.start, num_ranks
        return found


def can_run(shape: Shape) -> bool:
    """Whether the kernels know heads of this size."""
    is_known = not shape.head_size % _LANES and shape.head_size <= _LARGEST_HEAD
    return is_known and not shape.num_heads % shape.num_kv_heads


def _check_layer(layer: LayerWeights, shape: Shape, num_members: int, num_weights: int) -> None:
    heads = shape.num_heads * shape.head_size
    sizes = {
        "qkv": (heads + 2 * shape.num_kv_heads * shape.head_size, shape.hidden_size),
        "out": (shape.hidden_size, heads),
        "gate_up": (2 * shape.inner_size, shape.hidden_size),
        "down": (shape.hidden_size, shape.inner_size),
    }
    for name, (num_out, num_in) in sizes.items():
        matrix: Matrix = getattr(layer, name)
        if matrix.weight.shape != (num_weights, num_out, num_in):
            raise ValueError(f"weights {tuple(matrix.weight.shape)} of {name} are no {(num_weights, num_out, num_in)}")
        if matrix.weight.dtype not in KINDS or not are_units(matrix.units, matrix.weight):
            raise ValueError(f"weights of {name} in {matrix.weight.dtype} are none of {', '.join(map(str, KINDS))}")
        check_plain((matrix.weight,), matrix.weight.dtype)
        if matrix.bias is not None:
            check_plain((matrix.bias,))
            if matrix.bias.shape != (num_weights, num_out):
                raise ValueError(f"the bias {tuple(matrix.bias.shape)} of {name} is no {(num_weights, num_out)}")
        if matrix.adapters is not None:
            if num_weights != 1:  # a thread has rows of those members alone whose weights it multiplies
                raise ValueError(f"adapters of {name} stand over {num_weights} weights and not over one base")
            _check_adapters(matrix.adapters, name, num_out, num_in, num_members)
    norms = ((layer.norm_in, shape.hidden_size), (layer.norm_mlp, shape.hidden_size))
    heads_too = [(norm, shape.head_size) for norm in (layer.norm_q, layer.norm_k) if norm is not None]
    for norm, size in (*norms, *heads_too):
        check_plain((norm,))
        if norm.shape not in ((1, 1, size), (num_members, 1, size)):
            raise ValueError(f"a norm's weights {tuple(norm.shape)} are no {(num_members, 1, size)}")


def _check_adapters(adapters: Adapters, name: str, num_out: int, num_in: int, num_members: int) -> None:
    down, ups, scales = adapters
    fits = down.shape == (len(down), num_in) and scales.shape == (len(down),) and len(ups) <= MOST_UPS
    for outputs, ranks, own_ranks, weight in ups:
        num_ranks = ranks.stop - ranks.start
        fits &= weight.shape == (outputs.stop - outputs.start, num_ranks) and len(own_ranks) == num_members
        fits &= outputs.start >= 0 and outputs.stop <= num_out and ranks.start >= 0 and ranks.stop <= len(down)
        fits &= all(0 <= own.start <= own.stop <= num_ranks for own in own_ranks)
    if not fits or down.dtype not in KINDS or down.dtype == torch.int8:
        raise ValueError(f"adapters of {len(down)} ranks and {tuple(scales.shape)} scales do not fit {name}")
    check_plain((down, *(up.weight for up in ups)), down.dtype)
    check_plain((scales,))
