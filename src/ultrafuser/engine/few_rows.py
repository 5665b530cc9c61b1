"""A few rows through weights and whole passes of Llama-like stacks, by our own kernels (`native.py`).

Products are then as fast as memory is read; what stands between them costs next to nothing, where torch's operations
and Python's calls take more time than the arithmetic. All in fp32 on the CPU; what a row becomes is the same to the bit
whatever other rows there are and however many threads.

Shapes: G specialists, M rows of each, I inputs, O outputs, R ranks of all specialists together, H hidden size, F inner
size, B choices, T new tokens, Q query heads, K key-value heads, D head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ultrafuser.engine import native
from ultrafuser.engine.native import KINDS, MOST_UPS, kernels
from ultrafuser.engine.slots import SlotCache, SlotView

MOST_ROWS = 32  # above that arithmetic is what costs, and torch's own products do it better
_LANES = 8
_LARGEST_HEAD = 256


class Up(NamedTuple):
    """The matrices B of one linear layer: outputs and ranks that are its own."""

    outputs: slice
    ranks: slice
    weight: Tensor  # [ranks, outputs]: turned, so that adding a rank reads neighbours


class Adapters(NamedTuple):
    """What the adapters of all members add to one product: B (scales * A x), for each of its linear layers."""

    down: Float[Tensor, "R I"]
    ups: Sequence[Up]
    scales: Float[Tensor, "G R"]  # zero for the ranks of other members


class Matrix(NamedTuple):
    """What one product multiplies by: of each member, or of the base that all share.

    Attributes:
        weight: [G or 1, O, I] in fp32, bf16, fp16 or int8, one member after another in memory.
        units: [G or 1, O], what one of an int8 weight is.
        bias: [G or 1, O] in fp32.
        adapters: Of the members of a shared base.
    """

    weight: Tensor
    units: Tensor | None = None
    bias: Tensor | None = None
    adapters: Adapters | None = None


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


def has_kernel() -> bool:
    """Whether there are kernels; compiles them where that was not done yet."""
    return kernels().few_rows is not None


def are_few(num_rows: int) -> bool:
    """Whether the kernels, where there are any, take so many rows now: not while torch traces for a compiler."""
    return num_rows <= MOST_ROWS and not torch.compiler.is_compiling()


def why_missing() -> str:
    """Why there are none, or an empty text."""
    return kernels().reason


def multiply(
    x: Float[Tensor, "G M I"], weight: Tensor, num_threads: int, units: Float[Tensor, "G O"] | None = None
) -> Float[Tensor, "G M O"]:
    """Rows times weights, in fp32.

    Args:
        x: In fp32.
        weight: [G, O, I], in fp32, bf16, fp16 or int8, one member after another in memory.
        num_threads: That share the work; those of torch.
        units: What one of an int8 weight is.

    Raises:
        ValueError: Shapes or types do not fit, or the weight is not contiguous.
    """
    num_members, num_rows, num_in = x.shape
    num_out = weight.shape[1]
    fits = weight.shape == (num_members, num_out, num_in) and weight.is_contiguous()
    known = x.dtype == torch.float32 and weight.dtype in KINDS and x.device.type == weight.device.type == "cpu"
    if not (fits and known and _are_units(units, weight)):
        raise ValueError(
            f"rows {tuple(x.shape)} of {x.dtype} and weights {tuple(weight.shape)} of {weight.dtype} do not fit, or lie"
            " in memory in other ways than the kernel reads"
        )
    x = x.contiguous()
    y = torch.empty((num_members, num_rows, num_out))
    pointers = (x.data_ptr(), weight.data_ptr(), None if units is None else units.data_ptr(), y.data_ptr())
    kernels().few_rows(*pointers, num_members, num_rows, num_in, num_out, KINDS[weight.dtype], num_threads)
    return y


def add_norm(
    x: Float[Tensor, "G M H"],
    more: Float[Tensor, "G M H"] | None,
    weight: Float[Tensor, "_ 1 H"],
    *,
    eps: float,
    num_threads: int,
) -> Float[Tensor, "G M H"]:
    """Add `more` to `x`, in place, and give its RMS norm times weights of all or one; any number of rows.

    Raises:
        ValueError: Shapes or types do not fit.
    """
    num_members, num_rows, size = x.shape
    if more is not None and more.shape != x.shape:
        raise ValueError(f"rows {tuple(x.shape)} and {tuple(more.shape)} cannot be added")
    _check((x,) if more is None else (x, more))
    if weight.shape not in ((1, 1, size), (num_members, 1, size)):
        raise ValueError(f"a norm's weights {tuple(weight.shape)} do not fit rows {tuple(x.shape)}")
    _check((weight,))
    y = torch.empty_like(x)
    pointers = (x.data_ptr(), None if more is None else more.data_ptr(), weight.data_ptr(), y.data_ptr())
    kernels().add_norm(*pointers, num_members, num_rows, size, len(weight), eps, num_threads)
    return y


def silu_mul(gate_up: Float[Tensor, "G M FF"], *, num_threads: int) -> Float[Tensor, "G M F"]:
    """silu(gate) * up, of rows that hold both side by side; any number of them.

    Raises:
        ValueError: An odd number of columns, or another type than fp32.
    """
    num_members, num_rows, both = gate_up.shape
    if both % 2:
        raise ValueError(f"rows of {both} columns cannot be halved")
    _check((gate_up,))
    y = torch.empty((num_members, num_rows, both // 2))
    kernels().silu_mul(gate_up.data_ptr(), y.data_ptr(), num_members * num_rows, both // 2, num_threads)
    return y


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
        _check((norm_out, cosines, sines))
        for layer in layers:
            _check_layer(layer, shape, num_members)
        self.num_norms = len(norm_out)
        heads = shape.num_heads + 2 * shape.num_kv_heads
        self._wide = max(heads * shape.head_size, 2 * shape.inner_size)
        self._narrow = max(shape.num_heads * shape.head_size, shape.inner_size)
        matrices = [matrix for layer in layers for matrix in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        self._room = max((len(m.adapters.down) for m in matrices if m.adapters is not None), default=0)
        self._tables: dict[int | None, ctypes.Array[native.Layer]] = {}
        self._cache: SlotCache | None = None  # of the last pass

    def takes(self, view: SlotView, num_members: int, num_rows: int) -> bool:
        """Whether so many rows of each of these members are few, and of a cache that the kernel knows."""
        together = num_rows * num_members if self.is_shared else num_rows
        return are_few(together) and view.starts is not None and view.cache.keys[0].dtype == torch.float32

    def __call__(self, x: Float[Tensor, "G M H"], view: SlotView, member: int | None = None) -> Float[Tensor, "G M H"]:
        """Embedded tokens, which are written over, to last hidden states; keys and values join the cache.

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
        _check((x,))
        assert view.starts is not None
        rows, starts = view.row_ids.contiguous(), view.starts.contiguous()
        y = torch.empty_like(x)
        sizes = (self._wide, self._narrow, self._room)
        wide, narrow, room = (torch.empty(num_members * num_rows * size) for size in sizes)
        scores = torch.empty(self.num_threads * (view.cache.length + _LANES))
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
            room=room.data_ptr(),
            attention=attention,
            num_layers=len(self.layers),
            hidden_size=shape.hidden_size,
            inner_size=shape.inner_size,
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
            _check((*cache.keys, *cache.values))
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
                    setattr(row, name, _structure(getattr(layer, name), member))
                for name in ("norm_in", "norm_mlp", "norm_q", "norm_k"):
                    weight = getattr(layer, name)
                    setattr(row, name, None if weight is None else own(weight, member).data_ptr())
            self._tables[member] = table
        return table


def can_run(shape: Shape) -> bool:
    """Whether the kernels know heads of this size."""
    is_known = not shape.head_size % _LANES and shape.head_size <= _LARGEST_HEAD
    return is_known and not shape.num_heads % shape.num_kv_heads


def _structure(matrix: Matrix, member: int | None) -> native.Matrix:
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
        found.down, found.scales = down.data_ptr(), own(scales, member).data_ptr()
        found.num_ranks, found.num_ups, found.adapter_kind = len(down), len(ups), KINDS[down.dtype]
        for place, up in zip(found.ups, ups, strict=False):
            num_ranks, num_out = up.weight.shape
            first = (up.outputs.start, num_out, up.ranks.start, num_ranks)
            place.weight = up.weight.data_ptr()
            place.first_out, place.num_out, place.first_rank, place.num_ranks = first
    return found


def own(tensor: Tensor, member: int | None) -> Tensor:
    """Of one member, or of all; what all share stays as it is."""
    return tensor if member is None or len(tensor) == 1 else tensor[member : member + 1]


def _check_layer(layer: LayerWeights, shape: Shape, num_members: int) -> None:
    heads = shape.num_heads * shape.head_size
    sizes = {
        "qkv": (heads + 2 * shape.num_kv_heads * shape.head_size, shape.hidden_size),
        "out": (shape.hidden_size, heads),
        "gate_up": (2 * shape.inner_size, shape.hidden_size),
        "down": (shape.hidden_size, shape.inner_size),
    }
    for name, (num_out, num_in) in sizes.items():
        matrix: Matrix = getattr(layer, name)
        count = len(matrix.weight)
        if matrix.weight.shape != (count, num_out, num_in) or count not in (1, num_members):
            raise ValueError(f"weights {tuple(matrix.weight.shape)} of {name} are no {(num_members, num_out, num_in)}")
        if matrix.weight.dtype not in KINDS or not _are_units(matrix.units, matrix.weight):
            raise ValueError(f"weights of {name} in {matrix.weight.dtype} are none of {', '.join(map(str, KINDS))}")
        _check((matrix.weight,), matrix.weight.dtype)
        if matrix.bias is not None:
            _check((matrix.bias,))
            if matrix.bias.shape != (count, num_out):
                raise ValueError(f"the bias {tuple(matrix.bias.shape)} of {name} is no {(count, num_out)}")
        if matrix.adapters is not None:
            _check_adapters(matrix.adapters, name, num_out, num_in, num_members)
    norms = ((layer.norm_in, shape.hidden_size), (layer.norm_mlp, shape.hidden_size))
    heads_too = [(norm, shape.head_size) for norm in (layer.norm_q, layer.norm_k) if norm is not None]
    for norm, size in (*norms, *heads_too):
        _check((norm,))
        if norm.shape not in ((1, 1, size), (num_members, 1, size)):
            raise ValueError(f"a norm's weights {tuple(norm.shape)} are no {(num_members, 1, size)}")


def _check_adapters(adapters: Adapters, name: str, num_out: int, num_in: int, num_members: int) -> None:
    down, ups, scales = adapters
    fits = down.shape == (len(down), num_in) and scales.shape == (num_members, len(down)) and len(ups) <= MOST_UPS
    for outputs, ranks, weight in ups:
        fits &= weight.shape == (ranks.stop - ranks.start, outputs.stop - outputs.start)
        fits &= outputs.start >= 0 and outputs.stop <= num_out and ranks.start >= 0 and ranks.stop <= len(down)
    if not fits or down.dtype not in KINDS or down.dtype == torch.int8:
        raise ValueError(f"adapters of {len(down)} ranks and {tuple(scales.shape)} scales do not fit {name}")
    _check((down, *(up.weight for up in ups)), down.dtype)
    _check((scales,))


def _are_units(units: Tensor | None, weight: Tensor) -> bool:
    """Whether int8 weights, and no others, have units."""
    if weight.dtype != torch.int8:
        return units is None
    if units is None or units.shape != weight.shape[:2]:
        return False
    return units.dtype == torch.float32 and units.is_contiguous() and units.device.type == "cpu"


def _check(tensors: tuple[Tensor, ...], dtype: torch.dtype = torch.float32) -> None:
    for tensor in tensors:
        if tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device} is no {dtype} in one piece")
