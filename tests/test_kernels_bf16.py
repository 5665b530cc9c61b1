"""Products of bf16 numbers in fp32."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrafuser.engine import few_rows
from ultrafuser.kernels.bf16 import has_bf16_kernel, multiply_bf16

needs_kernel = pytest.mark.skipif(not has_bf16_kernel(), reason="no kernel, or a processor that does not multiply bf16")


def draw(num_rows: int, num_in: int, num_out: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((num_rows + num_out, num_in), generator=generator).bfloat16()
    return rows[:num_rows], rows[num_rows:]


@needs_kernel
@settings(deadline=None)
@given(num_rows=st.integers(0, 90), num_in=st.integers(1, 100), num_out=st.integers(0, 150))
def test_it_is_the_product_in_double_precision_and_that_of_a_few_rows_to_the_bit(
    num_rows: int, num_in: int, num_out: int
):
    x, weight = draw(num_rows, num_in, num_out)
    y = multiply_bf16(x, weight)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)
    for row in range(0, num_rows, 7):
        assert torch.equal(y[row], few_rows.multiply(x[None, row : row + 1].float(), weight[None], 1)[0, 0])


@needs_kernel
def test_the_number_of_threads_and_the_place_change_no_bit():
    x, weight = draw(37, 70, 203)
    expected = multiply_bf16(x, weight)
    wide = torch.zeros(37, 140, dtype=torch.bfloat16)
    wide[:, ::2] = x
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3, 8):
            torch.set_num_threads(num_threads)
            out = torch.full((37, 203), torch.nan)
            assert multiply_bf16(wide[:, ::2], weight, out) is out
            assert torch.equal(out, expected)
    finally:
        torch.set_num_threads(before)


@needs_kernel
@pytest.mark.parametrize(
    ("x", "weight", "out"),
    [
        (torch.zeros(2, 8).bfloat16(), torch.zeros(4, 9).bfloat16(), None),
        (torch.zeros(2, 8), torch.zeros(4, 8).bfloat16(), None),
        (torch.zeros(2, 8).bfloat16(), torch.zeros(4, 8), None),
        (torch.zeros(2, 8).bfloat16(), torch.zeros(8, 4).bfloat16().T, None),
        (torch.zeros(2, 8).bfloat16(), torch.zeros(4, 8).bfloat16(), torch.zeros(2, 5)),
        (torch.zeros(2, 8).bfloat16(), torch.zeros(4, 8).bfloat16(), torch.zeros(2, 4).double()),
        (torch.zeros(2, 8).bfloat16(), torch.zeros(4, 8).bfloat16(), torch.zeros(4, 2).T),
        (torch.zeros(2, 8).bfloat16(), torch.zeros(4, 8, device="meta").bfloat16(), None),
    ],
    ids=["inputs", "rows", "weights", "layout", "results", "type of results", "layout of results", "device"],
)
def test_what_does_not_fit_is_refused_and_not_read(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None):
    with pytest.raises(ValueError, match="do not fit"):
        inspect.unwrap(multiply_bf16)(x, weight, out)


@pytest.mark.parametrize("has_place", [False, True])
def test_elsewhere_than_on_a_cpu_torch_is_asked_for_a_result_in_fp32(has_place: bool):
    """On `meta`, where torch checks what it is asked and computes nothing; `test_gpu.py` has the numbers."""
    x, weight = torch.zeros(3, 8, device="meta").bfloat16(), torch.zeros(5, 8, device="meta").bfloat16()
    out = torch.zeros(3, 5, device="meta") if has_place else None
    y = multiply_bf16(x, weight, out)
    assert (y.shape, y.dtype, y.device.type) == ((3, 5), torch.float32, "meta")
    assert out is None or y is out
