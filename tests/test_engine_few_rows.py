"""The kernel for a few rows: what it computes, and that it is missing for a reason where it is missing."""

from __future__ import annotations

import copy
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

from ultrafuser.engine import few_rows, native
from ultrafuser.engine.attention import Heads
from ultrafuser.engine.slots import SlotCache, SlotView

needs_kernel = pytest.mark.skipif(not few_rows.has_kernel(), reason=f"no kernel: {few_rows.why_missing()}")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(num_members: int, num_rows: int, num_in: int, num_out: int, dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((num_members, num_rows, num_in), generator=generator)
    return x, torch.randn((num_members, num_out, num_in), generator=generator).to(dtype)


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
    x, weight = draw(num_members, num_rows, num_in, num_out, dtype)
    y = few_rows.multiply(x, weight, num_threads)
    assert y.dtype == torch.float32
    expected = torch.bmm(x.double(), weight.double().transpose(1, 2))
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_to_the_bit_in_any_company(dtype: torch.dtype):
    """Of other rows, members and threads: so an answer does not depend on what else is in the batch."""
    x, weight = draw(3, 19, 77, 21, dtype)
    alone = [
        [few_rows.multiply(x[g : g + 1, m : m + 1], weight[g : g + 1], 1)[0, 0] for m in range(19)] for g in (0, 1, 2)
    ]
    for num_threads in (1, 2, 3, 7):
        for num_rows in (1, 2, 3, 4, 5, 7, 8, 19):
            together = few_rows.multiply(x[:, :num_rows], weight, num_threads)
            for g in range(3):
                for m in range(num_rows):
                    assert torch.equal(together[g, m], alone[g][m])


@needs_kernel
def test_every_16_bit_value_is_read_as_it_is():
    """Zeros, the smallest and the largest, infinities and what is no number."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        weight = patterns.view(dtype)[None, :, None]
        read = few_rows.multiply(torch.ones(1, 1, 1), weight, 2)[0, 0]
        expected = weight[0, :, 0].float()
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
    ],
    ids=["inputs", "members", "type of rows", "layout", "type of weights", "device"],
)
def test_what_does_not_fit_is_refused_and_not_read(x: torch.Tensor, weight: torch.Tensor):
    multiply = inspect.unwrap(few_rows.multiply)  # as users have it: without the tests' checks of shapes
    with pytest.raises(ValueError, match="do not fit"):
        multiply(x, weight, 1)


# Where it comes from

ASK = "from ultrafuser.engine import few_rows; print(few_rows.why_missing() or 'there')"


def ask(**environment: str) -> str:
    """What a fresh process says."""
    done = subprocess.run(
        [sys.executable, "-c", ASK], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
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
    wanted = x + 0.5 * more if has_more else x.clone()

    y = few_rows.add_norm(x, more if has_more else None, weight, scale=0.5, eps=1e-5, num_threads=2)

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
    assert few_rows.add_norm(nan.clone(), None, torch.ones(1, 1, 24), scale=1.0, eps=1e-5, num_threads=2).isnan().all()
    assert few_rows.multiply(nan, torch.ones(1, 5, 24), 1).isnan().all()


def read_by_hand(
    qkv: torch.Tensor, cache: SlotCache, view: SlotView, cos: Any, sin: Any, heads: Any, window: int | None
):
    """Attention token by token, in double precision; the cache gets what is new."""
    num_members, num_rows, _ = qkv.shape
    num_q, num_kv, size = heads
    y = torch.zeros(num_members, num_rows, num_q * size, dtype=torch.float64)
    for r, (row, start) in enumerate(zip(view.row_ids.tolist(), view.starts.tolist(), strict=True)):
        choice, member = divmod(r, num_members)
        for t in range(view.num_new):
            at, column = choice * view.num_new + t, start + t
            parts = qkv[member, at].view(num_q + 2 * num_kv, size)
            turned = parts * cos[column] + parts.roll(size // 2, -1) * sin[column]
            cache.keys[0][row, :, column] = turned[num_q : num_q + num_kv]
            cache.values[0][row, :, column] = parts[num_q + num_kv :]
            first = 0 if window is None else max(0, column + 1 - window)
            for q in range(num_q):
                kv = q // (num_q // num_kv)
                keys = cache.keys[0][row, kv, first : column + 1].double()
                shares = (keys @ turned[q].double() / size**0.5).softmax(0)
                read = shares @ cache.values[0][row, kv, first : column + 1].double()
                y[member, at, q * size : (q + 1) * size] = read
    return y


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(
    num_members=st.integers(1, 3),
    slots=st.permutations(range(3)).flatmap(lambda order: st.integers(1, 3).map(lambda n: order[:n])),
    alone=st.booleans(),
    num_new=st.integers(1, 5),
    heads=st.sampled_from([(2, 2, 8), (4, 2, 16), (3, 1, 40), (6, 3, 64), (2, 1, 256)]),
    window=st.sampled_from([None, 1, 3, 50]),
    num_threads=st.integers(1, 3),
    data=st.data(),
)
def test_attention_is_that_by_hand(
    num_members: int, slots: list[int], alone: bool, num_new: int, heads: Any, window: Any, num_threads: int, data: Any
):
    torch.manual_seed(0)
    length, (num_q, num_kv, size) = 40, heads
    cache = SlotCache(num_members, 3, length, [(num_kv, size)], dtype=torch.float32, device=torch.device("cpu"))
    cache.keys[0].normal_()
    cache.values[0].normal_()
    twin = copy.deepcopy(cache)
    member, running = (num_members - 1, 1) if alone else (None, num_members)
    starts = data.draw(st.lists(st.integers(0, 30), min_size=running * len(slots), max_size=running * len(slots)))
    cos, sin = torch.randn(2, length, size)
    qkv = torch.randn(running, len(slots) * num_new, (num_q + 2 * num_kv) * size)
    view = SlotView(cache, slots, member, torch.tensor(starts), num_new)

    y = few_rows.Attend(view, cos, sin, Heads(running, num_q, num_kv, window), num_threads=num_threads)(0, qkv)

    torch.testing.assert_close(y.double(), read_by_hand(qkv, twin, view, cos, sin, heads, window), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache.keys[0], twin.keys[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(cache.values[0], twin.values[0])


@needs_kernel
def test_attention_beyond_a_slot_or_over_other_heads_is_refused():
    cache = SlotCache(1, 1, 10, [(2, 8)], dtype=torch.float32, device=torch.device("cpu"))
    who = Heads(1, 2, 2, None)
    tables = torch.zeros(2, 10, 8)
    view = SlotView(cache, [0], None, torch.tensor([8]), 3)
    with pytest.raises(ValueError, match="11 columns do not fit a slot of 10"):
        few_rows.Attend(view, *tables, who, num_threads=1)
    attend = few_rows.Attend(SlotView(cache, [0], None, torch.tensor([8]), 2), *tables, who, num_threads=1)
    for shape in ((1, 2, 40), (1, 3, 48), (2, 2, 48)):
        with pytest.raises(ValueError, match="are not what"):
            attend(0, torch.zeros(shape))


@needs_kernel
@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_base_and_its_adapters_are_added_up(num_threads: int):
    torch.manual_seed(0)
    x, scales = torch.randn(3, 4, 20), torch.randn(3, 6)
    down, base, ups = torch.randn(6, 20).half(), torch.randn(9, 20).half(), torch.randn(9, 6).half()
    expected = x @ base.float().t() + (x @ down.float().t() * scales[:, None]) @ ups.float().t()

    y = few_rows.multiply_adapted(x, down, scales, torch.cat([base, ups], dim=1), num_threads)

    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="do not fit adapters"):
        few_rows.multiply_adapted(x, down, scales, base, num_threads)


def test_a_buffer_in_large_pages_is_an_ordinary_one():
    for shape in ((0,), (3, 5), (3, 1 << 20)):
        buffer = native.in_large_pages(torch.empty(shape))
        assert torch.equal(buffer.fill_(2.0), torch.full(shape, 2.0))
