"""The kernel for a few rows: what it computes, and that it is missing for a reason where it is missing."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ultrafuser.engine import few_rows

needs_kernel = pytest.mark.skipif(not few_rows.has_kernel(), reason=f"no kernel: {few_rows.why_missing()}")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(num_members: int, num_rows: int, num_in: int, num_out: int, dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((num_members, num_rows, num_in), generator=generator)
    return x, torch.randn((num_members, num_out, num_in), generator=generator).to(dtype)


@needs_kernel
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
def test_a_folder_that_cannot_be_made_is_no_hindrance(tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    assert ask(XDG_CACHE_HOME=str(tmp_path / "file")) == "there"


@needs_kernel
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": ""}, "there is no C compiler (install gcc)"),
        ({"CC": "false"}, "false ends with 1: no message"),
        ({"CC": "no-such-compiler"}, "the C compiler 'no-such-compiler' cannot be started"),
        ({"ULTRAFUSER_KERNEL": "0"}, "ULTRAFUSER_KERNEL=0 leaves it out"),
        ({"ATEN_CPU_CAPABILITY": "default"}, "the processor has no AVX2"),
    ],
    ids=["no compiler", "failing compiler", "unknown compiler", "switched off", "old processor"],
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
    with pytest.raises(few_rows._MissingError, match=r"multiplies torch.float32 wrongly"):
        few_rows._check(lambda *_: None)
