"""The kernels for a few rows: what they compute, and that they are missing for a reason where they are missing."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrafuser.engine import few_rows
from ultrafuser.engine.few_rows import Adapters, Matrix, Up
from ultrafuser.engine.passes import Layers, LayerWeights, Shape
from ultrafuser.engine.slots import SlotCache, SlotView
from ultrafuser.kernels import native

needs_kernel = pytest.mark.skipif(not few_rows.has_kernel(), reason=f"no kernel: {few_rows.why_missing()}")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def as_read(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows as the kernels read them where they meet weights of a type."""
    return x.to(dtype).to(x.dtype) if few_rows.rounds(dtype) else x


def draw(num_members: int, num_rows: int, num_in: int, num_out: int, dtype: torch.dtype):
    """Rows, weights, and what one of them is if they are whole numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((num_members, num_rows, num_in), generator=generator)
    if dtype == torch.int8:
        weight = torch.randint(-128, 128, (num_members, num_out, num_in), generator=generator)
        return x, weight.to(dtype), torch.rand((num_members, num_out), generator=generator) / 128
    return x, torch.randn((num_members, num_out, num_in), generator=generator).to(dtype), None


@needs_kernel
@settings(deadline=None)
@given(
    num_members=st.integers(1, 4),
    num_rows=st.integers(0, 35),
    num_in=st.integers(1, 70),
    num_out=st.integers(1, 40),
    num_threads=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
)
def test_it_is_the_product_in_double_precision(
    num_members: int, num_rows: int, num_in: int, num_out: int, num_threads: int, dtype: torch.dtype
):
    x, weight, units = draw(num_members, num_rows, num_in, num_out, dtype)
    y = few_rows.multiply(x, weight, num_threads, units)
    assert y.dtype == torch.float32
    expected = torch.bmm(as_read(x, dtype).double(), weight.double().transpose(1, 2))
    if units is not None:
        expected *= units[:, None]
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_in", "num_out"), [(77, 21), (48, 6), (16, 23)])
def test_a_row_is_the_same_to_the_bit_in_any_company(num_in: int, num_out: int, dtype: torch.dtype):
    """Of other rows, members and threads: so an answer does not depend on what else is in the batch.

    Which outputs go together to a tile depends on the number of rows: those of six are not always in one.
    """
    x, weight, units = draw(3, 19, num_in, num_out, dtype)
    alone = [
        [
            few_rows.multiply(
                x[g : g + 1, m : m + 1], weight[g : g + 1], 1, None if units is None else units[g : g + 1]
            )[0, 0]
            for m in range(19)
        ]
        for g in (0, 1, 2)
    ]
    for num_threads in (1, 2, 3, 7):
        for num_rows in (1, 2, 3, 4, 5, 7, 8, 19):
            together = few_rows.multiply(x[:, :num_rows], weight, num_threads, units)
            for g in range(3):
                for m in range(num_rows):
                    assert torch.equal(together[g, m], alone[g][m])


@needs_kernel
def test_every_16_bit_value_is_read_as_it_is():
    """Zeros, the smallest and the largest, infinities and what is no number.

    But instructions for bf16 read numbers below the smallest normal one, 1e-38, as zeros.
    """
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        weight = patterns.view(dtype)[None, :, None]
        read = few_rows.multiply(torch.ones(1, 1, 1), weight, 2)[0, 0]
        expected = weight[0, :, 0].float()
        if few_rows.rounds(dtype):
            expected[expected.abs() < torch.finfo(dtype).smallest_normal] = 0
        assert torch.equal(read.isnan(), expected.isnan())
        assert torch.equal(read[~read.isnan()], expected[~expected.isnan()])


@needs_kernel
def test_weights_may_begin_anywhere_and_rows_may_have_gaps():
    values = torch.randn(1 + 3 * 13 * 11)
    weight = values[1:].view(3, 13, 11)  # on no boundary of a vector
    x = torch.randn(3, 5, 22)[:, :, ::2]
    torch.testing.assert_close(few_rows.multiply(x, weight, 2), torch.bmm(x, weight.transpose(1, 2)))


@needs_kernel
@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.zeros(1, 2, 8), torch.zeros(1, 4, 9)),
        (torch.zeros(2, 2, 8), torch.zeros(1, 4, 8)),
        (torch.zeros(1, 2, 8, dtype=torch.float64), torch.zeros(1, 4, 8)),
        (torch.zeros(1, 2, 8), torch.zeros(1, 8, 4).transpose(1, 2)),
        (torch.zeros(1, 2, 8), torch.zeros(1, 4, 8, dtype=torch.float64)),
        (torch.zeros(1, 2, 8), torch.zeros(1, 4, 8, device="meta")),
        (torch.zeros(1, 2, 8), torch.zeros(1, 4, 8, dtype=torch.int8)),
    ],
    ids=["inputs", "members", "type of rows", "layout", "type of weights", "device", "int8 without units"],
)
def test_what_does_not_fit_is_refused_and_not_read(x: torch.Tensor, weight: torch.Tensor):
    multiply = inspect.unwrap(few_rows.multiply)  # as users have it: without the tests' checks of shapes
    with pytest.raises(ValueError, match="do not fit"):
        multiply(x, weight, 1)


# Where it comes from

ASK = "from ultrafuser.engine import few_rows; print(few_rows.why_missing() or 'there')"


def ask(**environment: str) -> str:
    """What a fresh process says, with the compiler that is found first."""
    told = {**{name: value for name, value in os.environ.items() if name != "CC"}, **environment}
    done = subprocess.run([sys.executable, "-c", ASK], env=told, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@needs_kernel
def test_it_is_compiled_once_and_kept(tmp_path: Path):
    assert ask(XDG_CACHE_HOME=str(tmp_path)) == "there"
    (library,) = (tmp_path / "ultrafuser").iterdir()
    assert ask(XDG_CACHE_HOME=str(tmp_path), PATH="") == "there"
    assert [library] == list((tmp_path / "ultrafuser").iterdir())


@needs_kernel
@pytest.mark.parametrize("place", ["file", "~no-such-user/cache"])
def test_a_folder_that_cannot_be_made_is_no_hindrance(tmp_path: Path, place: str):
    (tmp_path / "file").write_text("no folder")
    assert ask(XDG_CACHE_HOME=place if place.startswith("~") else str(tmp_path / place)) == "there"


@needs_kernel
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": ""}, "there is no C compiler (install gcc)"),
        ({"CC": "false"}, "false ends with 1: no message"),
        ({"CC": "no-such-compiler"}, "the C compiler 'no-such-compiler' cannot be started"),
        ({"CC": "/dev/null"}, "the C compiler '/dev/null' cannot be started"),
        ({"ULTRAFUSER_KERNEL": "0"}, "ULTRAFUSER_KERNEL=0 leaves it out"),
        ({"ATEN_CPU_CAPABILITY": "default"}, "the processor has no AVX2"),
    ],
    ids=["no compiler", "failing compiler", "unknown compiler", "no program", "switched off", "old processor"],
)
def test_where_it_is_missing_there_is_a_reason_and_no_rubbish(environment: dict[str, str], reason: str, tmp_path: Path):
    assert ask(XDG_CACHE_HOME=str(tmp_path), **environment) == reason
    assert list(tmp_path.glob("ultrafuser/*")) == []


@needs_kernel
def test_a_kept_library_that_is_broken_is_made_anew_for_this_process(tmp_path: Path):
    ask(XDG_CACHE_HOME=str(tmp_path))
    (library,) = (tmp_path / "ultrafuser").iterdir()
    library.write_bytes(library.read_bytes()[:100])
    assert ask(XDG_CACHE_HOME=str(tmp_path)) == "there"


@needs_kernel
def test_it_is_not_refused_where_torch_is_told_to_compute_in_other_types():
    """Training may be the first to ask, inside of autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        native.check_product(native.kernels().few_rows)


@needs_kernel
def test_a_library_that_computes_something_else_is_not_used():
    with pytest.raises(native.MissingError, match=r"multiplies torch.float32 wrongly"):
        native.check_product(lambda *_: None)


# What stands between products


@needs_kernel
@settings(deadline=None)
@given(
    num_members=st.integers(1, 3),
    num_rows=st.integers(1, 9),
    size=st.integers(1, 70),
    own_weights=st.booleans(),
    has_more=st.booleans(),
)
def test_a_sum_and_its_norm_are_those_of_torch(
    num_members: int, num_rows: int, size: int, own_weights: bool, has_more: bool
):
    torch.manual_seed(0)
    x, more = torch.randn(2, num_members, num_rows, size)
    weight = torch.randn(num_members if own_weights else 1, 1, size)
    wanted = x + more if has_more else x.clone()

    y = few_rows.add_norm(x, more if has_more else None, weight, eps=1e-5, num_threads=2)

    torch.testing.assert_close(x, wanted)
    torch.testing.assert_close(y, F.rms_norm(wanted, (size,), None, 1e-5) * weight)


@needs_kernel
@settings(deadline=None)
@given(num_rows=st.integers(1, 9), size=st.integers(1, 40), factor=st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
def test_an_activation_is_that_of_torch(num_rows: int, size: int, factor: float):
    torch.manual_seed(0)
    both = torch.randn(2, num_rows, 2 * size) * factor
    gate, up = both.double().chunk(2, dim=-1)
    torch.testing.assert_close(
        few_rows.silu_mul(both, num_threads=2).double(), F.silu(gate) * up, rtol=2e-6, atol=1e-25
    )


@needs_kernel
def test_numbers_that_are_none_stay_none():
    nan = torch.full((1, 2, 24), torch.nan)
    assert few_rows.silu_mul(nan, num_threads=1).isnan().all()
    assert few_rows.add_norm(nan.clone(), None, torch.ones(1, 1, 24), eps=1e-5, num_threads=2).isnan().all()
    assert few_rows.multiply(nan, torch.ones(1, 5, 24), 1).isnan().all()


# Whole passes


class Stack:
    """Random layers of a stack, the same numbers in double precision, and a cache that holds something.

    Args:
        num_members: Specialists.
        heads: Of queries, of keys and values, and their size.
        kinds: Types of weights of the four products.
        is_shared: One base for all, with adapters.
        num_ranks: Of the first one's adapter; the others have more.
        has_bias, has_head_norm: As Qwen2 and Qwen3 have them.
        window: Of attention.
        kept: Type of keys and values.
    """

    hidden_size, inner_size, length, num_slots = 24, 20, 40, 3

    def __init__(
        self,
        num_members: int,
        heads: tuple[int, int, int],
        *,
        kinds: Any = (torch.float32,) * 4,
        num_layers: int = 2,
        is_shared: bool = False,
        num_ranks: int = 2,
        has_bias: bool = False,
        has_head_norm: bool = False,
        window: int | None = None,
        kept: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        self.num_members, self.is_shared, self.has_bias = num_members, is_shared, has_bias
        self.num_ranks = num_ranks
        num_q, num_kv, size = heads
        self.shape = Shape(num_q, num_kv, size, self.hidden_size, self.inner_size, window, 1e-5)
        outs = ((num_q + 2 * num_kv) * size, self.hidden_size, 2 * self.inner_size, self.hidden_size)
        ins = (self.hidden_size, num_q * size, self.hidden_size, self.inner_size)
        self.layers = [
            LayerWeights(
                *(self._matrix(o, i, kind) for o, i, kind in zip(outs, ins, kinds, strict=True)),
                norm_in=self._norm(self.hidden_size),
                norm_mlp=self._norm(self.hidden_size),
                norm_q=self._norm(size) if has_head_norm else None,
                norm_k=self._norm(size) if has_head_norm else None,
            )
            for _ in range(num_layers)
        ]
        self.norm_out = self._norm(self.hidden_size)
        self.cos, self.sin = torch.randn(2, self.length, size)
        kv_heads = [(num_kv, size)] * num_layers
        self.cache = SlotCache(
            num_members, self.num_slots, self.length, kv_heads, dtype=kept, device=torch.device("cpu")
        )
        for storage in (*self.cache.keys, *self.cache.values):
            storage.normal_()

    def _matrix(self, num_out: int, num_in: int, kind: torch.dtype) -> Matrix:
        count = 1 if self.is_shared else self.num_members
        weight = torch.randn(count, num_out, num_in) / num_in**0.5
        units = torch.rand(count, num_out) / 64 if kind == torch.int8 else None
        adapters = None
        if self.is_shared:
            sizes = [(1, self.num_ranks + member) for member in range(self.num_members)]
            sizes[0] = (0, self.num_ranks)  # the first has no adapter of the first layer
            ranks = sum(map(sum, sizes))
            scales = torch.rand(ranks)
            adapter_kind = torch.float32 if kind == torch.int8 else kind
            down = (torch.randn(ranks, num_in) / num_in**0.5).to(adapter_kind)
            half, first, ups = num_out // 2, 0, []
            for layer, outputs in enumerate((slice(3, half), slice(half, num_out))):  # two linear layers side by side
                own, last = [], first
                for own_sizes in sizes:
                    own.append(slice(last - first, last - first + own_sizes[layer]))
                    last += own_sizes[layer]
                if last > first:  # somebody has one
                    up = torch.randn(outputs.stop - outputs.start, last - first).to(adapter_kind)
                    ups.append(Up(outputs, slice(first, last), own, up))
                first = last
            adapters = Adapters(down, ups, scales)
        if units is not None:
            weight = (weight / units[..., None]).round().clamp(-127, 127)
        bias = torch.randn(count, num_out) if self.has_bias else None
        return Matrix(weight.to(kind), units, bias, adapters)

    def _norm(self, size: int) -> torch.Tensor:
        return torch.randn(1 if self.is_shared else self.num_members, 1, size)

    def kernel(self, num_threads: int = 1) -> Layers:
        options = {"num_members": self.num_members, "num_threads": num_threads}
        return Layers(self.layers, self.norm_out, self.cos, self.sin, self.shape, **options)

    def by_hand(self, x: torch.Tensor, view: SlotView, member: int | None) -> torch.Tensor:
        """The same pass, token by token, in double precision; the cache gets what is new."""
        members = range(self.num_members) if member is None else [member]
        x = x.double()
        for index, layer in enumerate(self.layers):
            h = self._normed(x, layer.norm_in, members)
            h = self._attend(self._times(h, layer.qkv, members), layer, index, view, members)
            x = x + self._times(h, layer.out, members)
            gate, up = self._times(self._normed(x, layer.norm_mlp, members), layer.gate_up, members).chunk(2, dim=-1)
            x = x + self._times(F.silu(gate) * up, layer.down, members)
        return self._normed(x, self.norm_out, members)

    def _times(self, x: torch.Tensor, matrix: Matrix, members: Any) -> torch.Tensor:
        found = []
        for rows, member in zip(x, members, strict=True):
            j = 0 if self.is_shared else member
            weight = matrix.weight[j].double()
            if matrix.units is not None:
                weight = weight * matrix.units[j].double()[:, None]
            read = as_read(rows.float(), matrix.weight.dtype).double()
            y = read @ weight.t()
            if matrix.adapters is not None:
                down, adapted, scales = matrix.adapters
                lowered = as_read((read @ down.double().t() * scales.double()).float(), down.dtype).double()
                for outputs, ranks, own, up in adapted:
                    y[:, outputs] += lowered[:, ranks][:, own[member]] @ up.double().t()[own[member]]
            found.append(y if matrix.bias is None else y + matrix.bias[j].double())
        return torch.stack(found)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor, members: Any) -> torch.Tensor:
        chosen = weight if self.is_shared else weight[list(members)]
        return F.rms_norm(x, x.shape[-1:], None, self.shape.eps) * chosen.double()

    def _attend(self, qkv: Any, layer: LayerWeights, index: int, view: SlotView, members: Any) -> torch.Tensor:
        num_q, num_kv, size, _, _, window, eps = self.shape
        keys, values = self.cache.keys[index], self.cache.values[index]
        y = torch.zeros(*qkv.shape[:2], num_q * size, dtype=torch.float64)
        assert view.starts is not None
        for r, (row, start) in enumerate(zip(view.row_ids.tolist(), view.starts.tolist(), strict=True)):
            choice, place = divmod(r, len(members))
            whose = 0 if self.is_shared else members[place]
            for t in range(view.num_new):
                at, column = choice * view.num_new + t, start + t
                parts = qkv[place, at].view(num_q + 2 * num_kv, size)
                queries, news, told = parts.split([num_q, num_kv, num_kv])
                if layer.norm_q is not None and layer.norm_k is not None:
                    queries, news = (
                        F.rms_norm(part, (size,), None, eps) * norm[whose, 0].double()
                        for part, norm in ((queries, layer.norm_q), (news, layer.norm_k))
                    )
                queries, news = (
                    part * self.cos[column] + part.roll(size // 2, -1) * self.sin[column] for part in (queries, news)
                )
                keys[row, :, column], values[row, :, column] = news, told
                queries = as_read(queries, keys.dtype)
                first = 0 if window is None else max(0, column + 1 - window)
                for q in range(num_q):
                    kv = q // (num_q // num_kv)
                    shares = (keys[row, kv, first : column + 1].double() @ queries[q] / size**0.5).softmax(0)
                    y[place, at, q * size : (q + 1) * size] = shares @ values[row, kv, first : column + 1].double()
        return y


def kept(stack: Stack) -> list[torch.Tensor]:
    return [storage.clone() for storage in (*stack.cache.keys, *stack.cache.values)]


@needs_kernel
@settings(max_examples=150, deadline=None)
@given(
    num_members=st.integers(1, 3),
    slots=st.permutations(range(3)).flatmap(lambda order: st.integers(1, 3).map(lambda n: order[:n])),
    alone=st.booleans(),
    num_new=st.integers(1, 5),
    heads=st.sampled_from([(2, 2, 8), (4, 2, 16), (3, 1, 40), (6, 3, 64), (2, 1, 256)]),
    kinds=st.tuples(*[st.sampled_from(DTYPES)] * 4),
    traits=st.fixed_dictionaries({name: st.booleans() for name in ("is_shared", "has_bias", "has_head_norm")}),
    window=st.sampled_from([None, 1, 3, 50]),
    dtype=st.sampled_from([torch.float32] + [torch.bfloat16] * few_rows.rounds(torch.bfloat16)),
    num_threads=st.integers(1, 3),
    num_ranks=st.sampled_from([1, 2, 16, 31, 63, 130]),
    data=st.data(),
)
def test_a_pass_is_that_by_hand(
    num_members: int,
    slots: list[int],
    alone: bool,
    num_new: int,
    heads: Any,
    kinds: Any,
    traits: Any,
    window: Any,
    dtype: torch.dtype,
    num_threads: int,
    num_ranks: int,
    data: Any,
):
    stack = Stack(num_members, heads, kinds=kinds, window=window, kept=dtype, num_ranks=num_ranks, **traits)
    member, running = (num_members - 1, 1) if alone else (None, num_members)
    starts = data.draw(st.lists(st.integers(0, 30), min_size=running * len(slots), max_size=running * len(slots)))
    view = SlotView(stack.cache, slots, member, torch.tensor(starts), num_new)
    x = torch.randn(running, len(slots) * num_new, stack.hidden_size)
    before = kept(stack)
    expected = stack.by_hand(x, view, member)
    by_hand = kept(stack)
    for storage, old in zip((*stack.cache.keys, *stack.cache.values), before, strict=True):
        storage.copy_(old)

    y = stack.kernel(num_threads)(x.clone(), view, member)

    # Where rows are rounded, a number near the middle of two becomes the other one here and there.
    off = 2e-2 if any(map(few_rows.rounds, (*kinds, dtype))) else 2e-4
    torch.testing.assert_close(y.double(), expected, rtol=off, atol=off)
    for mine, other in zip(kept(stack), by_hand, strict=True):
        torch.testing.assert_close(mine, other, rtol=off, atol=off)


@needs_kernel
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_shared", [False, True])
def test_a_pass_is_the_same_to_the_bit_in_any_company(is_shared: bool, kind: torch.dtype):
    kept_in = kind if few_rows.rounds(kind) else torch.float32
    stack = Stack(3, (4, 2, 16), is_shared=is_shared, kinds=(kind,) * 4, kept=kept_in)
    starts, x = torch.tensor([5, 9, 4, 0, 7, 11, 30, 2, 2]), torch.randn(3, 3, 2, stack.hidden_size)
    before = kept(stack)

    def run(chosen: list[int], member: int | None, num_threads: int) -> torch.Tensor:
        for storage, old in zip((*stack.cache.keys, *stack.cache.values), before, strict=True):
            storage.copy_(old)
        own = starts.view(3, 3)[chosen] if member is None else starts.view(3, 3)[chosen, member, None]
        rows = x[:, chosen] if member is None else x[member : member + 1, chosen]
        view = SlotView(stack.cache, chosen, member, own.reshape(-1), 2)
        y = stack.kernel(num_threads)(rows.reshape(len(rows), -1, stack.hidden_size).contiguous(), view, member)
        return y.view(len(rows), len(chosen), 2, -1)

    together = run([0, 1, 2], None, 2)
    for slot in range(3):
        assert torch.equal(run([slot], None, 1)[:, 0], together[:, slot])
        for member in range(3):
            assert torch.equal(run([slot], member, 3)[0, 0], together[member, slot])


@needs_kernel
def test_rows_beyond_a_slot_or_over_another_cache_are_refused():
    stack = Stack(2, (2, 2, 8))
    kernel, x = stack.kernel(), torch.zeros(2, 3, stack.hidden_size)
    with pytest.raises(ValueError, match="41 columns do not fit a slot of 40"):
        kernel(x, SlotView(stack.cache, [0], None, torch.tensor([38, 0]), 3))
    fits = SlotView(stack.cache, [0], None, torch.tensor([37, 0]), 3)
    with pytest.raises(ValueError, match="3 rows of 2 specialists are no"):
        kernel(x[:, :2], fits)
    with pytest.raises(ValueError, match=r"is no torch.float32 in one piece"):
        kernel(x.double(), fits)
    other = Stack(2, (2, 1, 8))
    with pytest.raises(ValueError, match="of 2 layers is no"):
        kernel(x, SlotView(other.cache, [0], None, torch.tensor([37, 0]), 3))


TWO = [slice(0, 2), slice(2, 4)]
OUTSIDE = Adapters(torch.zeros(4, 20), [Up(slice(20, 25), slice(0, 4), TWO, torch.zeros(5, 4))], torch.zeros(4))


@needs_kernel
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": Matrix(torch.zeros(2, 48, 23))}, "of qkv are no"),
        ({"down": Matrix(torch.zeros(2, 24, 20, dtype=torch.int8))}, "of down in torch.int8"),
        ({"down": Matrix(torch.zeros(2, 24, 20), bias=torch.zeros(24))}, "the bias .* of down"),
        ({"out": Matrix(torch.zeros(2, 16, 24).transpose(1, 2))}, "in one piece"),
        ({"norm_in": torch.zeros(3, 1, 24)}, "a norm's weights"),
        ({"down": Matrix(torch.zeros(1, 24, 20), adapters=OUTSIDE)}, "do not fit down"),
        ({"down": Matrix(torch.zeros(2, 24, 20), adapters=OUTSIDE)}, "not over one base"),
        ({"down": Matrix(torch.zeros(1, 24, 20))}, "of down are no"),
    ],
    ids=["shape", "units", "bias", "layout", "norm", "adapters", "adapters without a base", "one weight among others"],
)
def test_layers_that_do_not_fit_are_refused_and_not_read(change: dict[str, Any], message: str):
    stack = Stack(2, (2, 2, 8), is_shared="do not fit" in message)
    stack.layers[1] = stack.layers[1]._replace(**change)
    with pytest.raises(ValueError, match=message):
        stack.kernel()


def test_a_buffer_in_large_pages_is_an_ordinary_one():
    for shape in ((0,), (3, 5), (3, 1 << 20)):
        buffer = native.in_large_pages(torch.empty(shape))
        assert torch.equal(buffer.fill_(2.0), torch.full(shape, 2.0))
