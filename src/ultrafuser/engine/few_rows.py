"""A few rows through weights, norms, activations and attention, by our own kernels (`native.py`): a call each.

Products are then as fast as memory is read; what stands between them costs next to nothing, where torch's operations
take more time than the arithmetic. All in fp32 on the CPU; what a row becomes is the same to the bit whatever other
rows there are and however many threads.

Shapes: G specialists, M rows of each, I inputs, O outputs, H hidden size, F inner size, B choices, T new tokens,
Q query heads, K key-value heads, D head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ultrafuser.engine.attention import Heads
from ultrafuser.engine.native import KINDS, Attention, kernels
from ultrafuser.engine.slots import SlotView

MOST_ROWS = 32  # above that arithmetic is what costs, and torch's own products do it better
_LANES = 8
_LARGEST_HEAD = 256


def has_kernel() -> bool:
    """Whether there are kernels; compiles them where that was not done yet."""
    return kernels().few_rows is not None


def are_few(num_rows: int) -> bool:
    """Whether the kernels, where there are any, take so many rows now: not while torch traces for a compiler."""
    return num_rows <= MOST_ROWS and not torch.compiler.is_compiling()


def why_missing() -> str:
    """Why there are none, or an empty text."""
    return kernels().reason


def multiply(x: Float[Tensor, "G M I"], weight: Float[Tensor, "G O I"], num_threads: int) -> Float[Tensor, "G M O"]:
    """Rows times weights, in fp32.

    Args:
        x: In fp32.
        weight: In fp32, bf16 or fp16, one member after another in memory.
        num_threads: That share the work; those of torch.

    Raises:
        ValueError: Shapes or types do not fit, or the weight is not contiguous.
    """
    num_members, num_rows, num_in = x.shape
    num_out = weight.shape[1]
    fits = weight.shape == (num_members, num_out, num_in) and weight.is_contiguous()
    known = x.dtype == torch.float32 and weight.dtype in KINDS and x.device.type == weight.device.type == "cpu"
    if not (fits and known):
        raise ValueError(
            f"rows {tuple(x.shape)} of {x.dtype} and weights {tuple(weight.shape)} of {weight.dtype} do not fit, or lie"
            " in memory in other ways than the kernel reads"
        )
    x = x.contiguous()
    y = torch.empty((num_members, num_rows, num_out))
    kind = KINDS[weight.dtype]
    kernels().few_rows(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), num_members, num_rows, num_in, num_out, kind, num_threads
    )
    return y


def multiply_adapted(
    x: Float[Tensor, "G M I"],
    down: Float[Tensor, "R I"],
    scales: Float[Tensor, "G R"],
    matrix: Float[Tensor, "O IR"],
    num_threads: int,
) -> Float[Tensor, "G M O"]:
    """`matrix` times rows and, as further inputs, `scales` times `down` times rows; R ranks, and I + R are IR.

    Args:
        x: In fp32, as scales are.
        down, matrix: In fp16.
        scales: Zero for the ranks of other members.
        num_threads: Of torch.

    Raises:
        ValueError: Shapes or types do not fit.
    """
    num_members, num_rows, num_in = x.shape
    num_ranks, num_out = len(down), len(matrix)
    shapes = (down.shape, scales.shape, matrix.shape)
    if shapes != ((num_ranks, num_in), (num_members, num_ranks), (num_out, num_in + num_ranks)):
        raise ValueError(f"rows {tuple(x.shape)} do not fit adapters of {', '.join(str(tuple(s)) for s in shapes)}")
    x, scales = x.contiguous(), scales.contiguous()
    _check((x, scales))
    _check((down, matrix), torch.float16)
    y = torch.empty((num_members, num_rows, num_out))
    room = torch.empty(num_members * num_rows * (num_in + 2 * num_ranks))
    lowered = room.data_ptr()
    kernels().adapted(
        x.data_ptr(),
        down.data_ptr(),
        scales.data_ptr(),
        matrix.data_ptr(),
        lowered,
        lowered + 4 * num_members * num_rows * num_ranks,
        y.data_ptr(),
        num_members,
        num_rows,
        num_in,
        num_ranks,
        num_out,
        num_threads,
    )
    return y


def add_norm(
    x: Float[Tensor, "G M H"],
    more: Float[Tensor, "G M H"] | None,
    weight: Float[Tensor, "_ 1 H"],
    *,
    scale: float,
    eps: float,
    num_threads: int,
) -> Float[Tensor, "G M H"]:
    """Add `scale` times `more` to `x`, in place, and give its RMS norm times weights of all or one; any number of rows.

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
    kernels().add_norm(
        x.data_ptr(),
        None if more is None else more.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        num_members,
        num_rows,
        size,
        len(weight),
        scale,
        eps,
        num_threads,
    )
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


def can_attend(view: SlotView, num_heads: int, num_kv_heads: int, size: int) -> bool:
    """Whether `Attend` knows heads of this size and rows of this view."""
    return view.starts is not None and not size % _LANES and size <= _LARGEST_HEAD and not num_heads % num_kv_heads


class Attend:
    """Attention of one forward, a call a layer: new keys and values join the cache, then queries read it.

    Args:
        view: Rows of the cache.
        cosines, sines: [positions, D], the sine with the sign of the rotation.
        heads: Whose.
        num_threads: Of torch.

    Raises:
        ValueError: A row would be written or read beyond its slot or the tables.
    """

    def __init__(self, view: SlotView, cosines: Tensor, sines: Tensor, heads: Heads, *, num_threads: int) -> None:
        if view.starts is None:
            raise ValueError("the rows of this view are not known beforehand")
        self.view, self.num_threads = view, num_threads
        num_members, self.num_heads, self.num_kv_heads, window = heads
        self.num_members, self.size = num_members, cosines.shape[-1]
        length = view.cache.length
        if view.stop > min(length, len(cosines)) or len(view.row_ids) % num_members:
            raise ValueError(f"{view.stop} columns do not fit a slot of {length} and tables of {len(cosines)}")
        _check((cosines, sines))
        self.rows, self.starts = view.row_ids.contiguous(), view.starts.contiguous()
        last = view.cache.num_slots * view.cache.num_members - 1
        if not self.rows.dtype == self.starts.dtype == torch.int64 or int(self.rows.max()) > last:
            raise ValueError(f"rows {self.rows.tolist()} are not all among the {last + 1} of the cache")
        self.scores = torch.empty((num_threads, length + _LANES))
        self.num_rows = len(self.rows) // num_members * view.num_new  # of each member
        self._held = (cosines, sines)
        self._call: Callable[..., None] = kernels().attend
        self._arguments = Attention(
            cosines=cosines.data_ptr(),
            sines=sines.data_ptr(),
            rows=self.rows.data_ptr(),
            starts=self.starts.data_ptr(),
            scores=self.scores.data_ptr(),
            num_members=num_members,
            num_choices=len(self.rows) // num_members,
            num_new=view.num_new,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            size=self.size,
            length=length,
            window=window or 0,
        )
        self._by_reference = ctypes.byref(self._arguments)

    def __call__(self, layer: int, qkv: Float[Tensor, "G M _"]) -> Float[Tensor, "G M _"]:
        """Queries, keys and values [G, B * T, (Q + 2 K) * D] of a layer to what is read [G, B * T, Q * D].

        Raises:
            ValueError: Shapes or types do not fit.
        """
        keys, values = self.view.cache.keys[layer], self.view.cache.values[layer]
        wanted = (self.num_members, self.num_rows, (self.num_heads + 2 * self.num_kv_heads) * self.size)
        if qkv.shape != wanted or keys.shape[1:] != (self.num_kv_heads, self.view.cache.length, self.size):
            raise ValueError(f"{tuple(qkv.shape)} and a cache {tuple(keys.shape)} are not what {wanted} are read from")
        _check((qkv, keys, values))
        y = torch.empty((self.num_members, self.num_rows, self.num_heads * self.size))
        arguments = self._arguments
        arguments.qkv, arguments.y = qkv.data_ptr(), y.data_ptr()
        arguments.keys, arguments.values = keys.data_ptr(), values.data_ptr()
        self._call(self._by_reference, self.num_threads)
        return y


def _check(tensors: tuple[Tensor, ...], dtype: torch.dtype = torch.float32) -> None:
    for tensor in tensors:
        if tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device} is no {dtype} in one piece")
