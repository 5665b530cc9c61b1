"""Products of few rows: exact ones are those of torch's linear layer, reduced ones are close; the model is unharmed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine_helpers import assert_answers, greedy, make_engine, make_similar, run, twin
from helpers import make_fused, make_mixed, make_model, make_trio
from ultrafuser.engine import few_rows, memory, weights
from ultrafuser.engine.fp16 import Fp16Matrix, has_fbgemm
from ultrafuser.engine.reduced import HalfProduct, Int4Product, Int8Product, is_int4_fast
from ultrafuser.engine.slots import SlotView
from ultrafuser.engine.weights import ExactProduct, PackedProduct, can_pack, compute_type, make_product
from ultrafuser.errors import ConfigError

SHAPES = {"square": (24, (24,)), "wide": (48, (16,)), "tall": (8, (24,)), "three side by side": (24, (24, 12, 12))}


@pytest.fixture(params=[True, False], ids=["our kernel", "torch's kernels"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Few rows multiplied by our own kernel, and as where there is no compiler."""
    if request.param and not few_rows.has_kernel():
        pytest.skip(f"no kernel: {few_rows.why_missing()}")
    monkeypatch.setattr(few_rows, "has_kernel", lambda: request.param)
    return bool(request.param)


@pytest.fixture(params=[False, True], ids=["wide registers", "AVX2"])
def avx2(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """On which side of the weight rows stand without our kernel."""
    monkeypatch.setattr(weights, "_is_avx2", lambda: request.param)
    return bool(request.param)


def make_parts(group: int, num_in: int, outs: tuple[int, ...], *, bias: bool) -> list[list[nn.Linear]]:
    return [[nn.Linear(num_in, num_out, bias=bias) for num_out in outs] for _ in range(group)]


def expected(parts: list[list[nn.Linear]], x: torch.Tensor) -> torch.Tensor:
    rows = [
        torch.cat([F.linear(one, linear.weight, linear.bias) for linear in linears], dim=-1)
        for linears, one in zip(parts, x, strict=True)
    ]
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.usefixtures("kernel", "avx2")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_threads", [1, 2, 4, 5])
@pytest.mark.parametrize(("num_in", "outs"), SHAPES.values(), ids=SHAPES.keys())
def test_an_exact_product_is_the_linear_layers(num_in: int, outs: tuple[int, ...], num_threads: int, bias: bool):
    for group in (1, 2, 3):
        parts = make_parts(group, num_in, outs, bias=bias)
        before = copy.deepcopy(parts)
        product = ExactProduct(parts, num_threads=num_threads)
        for rows in (*range(1, 18), 31, 40):
            x = torch.randn(group, rows, num_in)
            torch.testing.assert_close(product(x), expected(before, x))
            for member in range(group):
                one = product(x[member : member + 1], member)
                torch.testing.assert_close(one, expected(before, x)[member : member + 1])


@torch.no_grad()
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("num_in", "outs"), SHAPES.values(), ids=SHAPES.keys())
def test_a_packed_product_is_the_linear_layers(num_in: int, outs: tuple[int, ...], bias: bool):
    for group in (1, 3):
        parts = make_parts(group, num_in, outs, bias=bias)
        before = copy.deepcopy(parts)
        product = PackedProduct(parts, num_threads=2)
        for rows in (*range(1, 18), 31, 40, 255, 256, 257, 600):
            x = torch.randn(group, rows, num_in)
            torch.testing.assert_close(product(x), expected(before, x))
            torch.testing.assert_close(product(x[-1:], group - 1), expected(before, x)[-1:])


def test_exact_weights_are_packed_only_in_fp32_and_where_it_is_wanted():
    parts = make_parts(1, 16, (8,), bias=False)
    assert isinstance(make_product(parts, "exact", num_threads=1, pack=False), ExactProduct)
    assert isinstance(make_product(parts, "exact", num_threads=1), PackedProduct) == can_pack(parts[0][0].weight)
    assert not can_pack(torch.empty(16, 8, dtype=torch.bfloat16))
    assert not can_pack(torch.empty(16, 8, device="meta"))


@torch.no_grad()
@pytest.mark.usefixtures("kernel")
def test_an_exact_product_of_bf16_weights_is_the_linear_layers():
    parts = [[nn.Linear(16, 48).bfloat16(), nn.Linear(16, 16).bfloat16()]]
    before = copy.deepcopy(parts)
    product = ExactProduct(parts, num_threads=2)
    for rows in (1, 3, 20):
        x = torch.randn(1, rows, 16).bfloat16()
        y = product(x.to(compute_type(before[0][0].weight, "exact", pack=False)))
        torch.testing.assert_close(y.bfloat16(), expected(before, x), rtol=2e-2, atol=5e-3)


@torch.no_grad()
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("num_in", "outs"), SHAPES.values(), ids=SHAPES.keys())
def test_the_parameters_become_views_of_the_products_buffer_and_stay_the_same(num_in: int, outs: tuple[int, ...]):
    parts = make_parts(2, num_in, outs, bias=True)
    before = copy.deepcopy(parts)
    product = ExactProduct(parts, num_threads=2)

    for linears, old in zip(parts, before, strict=True):
        for linear, other in zip(linears, old, strict=True):
            assert torch.equal(linear.weight, other.weight)
            assert linear.weight.untyped_storage().data_ptr() == product.weight.untyped_storage().data_ptr()


@torch.no_grad()
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_that_are_widened_are_those_in_fp32(dtype: torch.dtype):
    """Whoever multiplies, what comes out is as exact as fp32 is; rows may be rounded to bf16 first, as layers do."""
    parts = [[nn.Linear(24, 40).to(dtype), nn.Linear(24, 17).to(dtype)] for _ in range(2)]
    wide = copy.deepcopy(parts)
    for linears in wide:
        for linear in linears:
            linear.float()
    if not weights.is_widened(parts[0][0].weight, pack=True):
        pytest.skip("without our kernel bf16 is left to a processor that multiplies it")
    product = make_product(parts, "exact", num_threads=2)
    for rows in (1, 3, 32, 33, 70):
        x = torch.randn(2, rows, 24)
        seen = x.to(dtype).float() if few_rows.rounds(dtype) else x
        torch.testing.assert_close(product(x), expected(wide, seen))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("runner", ["stacked", "sequential"])
@pytest.mark.parametrize("drafts", [(), ("self",)])
def test_an_engine_answers_the_same_whichever_kernel_it_has(pack: bool, runner: Any, drafts: Any):
    model = make_fused(make_trio(tied=True))
    reference = twin(model)
    engine = make_engine(model, pack=pack, runner=runner, drafts=drafts, draft_weights="auto")

    for request in (greedy(7, 9, 5, max_tokens=12), greedy(4, 4, 4, max_tokens=12)):
        assert_answers(reference, request, run(engine, request)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_lose_nothing_in_a_scaled_fp16_matrix(dtype: torch.dtype):
    if not has_fbgemm():
        pytest.skip("this build of torch has no FBGEMM")
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn((40, 24), generator=generator) * torch.logspace(-5, 1, 24)).to(dtype)
    for num_threads in (1, 2):
        matrix = Fp16Matrix(weight, num_threads=num_threads, is_scaled=True)
        assert torch.equal(matrix(torch.eye(24)).t(), weight.float())
        assert not torch.equal(
            Fp16Matrix(weight.float() * 1e-4, num_threads=num_threads)(torch.eye(24)).t(), weight.float() * 1e-4
        )


@torch.no_grad()
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("bias", [False, True])
def test_half_weights_are_close(bias: bool):
    parts = make_parts(2, 32, (24, 8), bias=bias)
    product = make_product(parts, "half", num_threads=1)
    for rows in (1, 5, 33):
        x = torch.randn(2, rows, 32)
        torch.testing.assert_close(product(x), expected(parts, x), rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(product(x[1:], 1), expected(parts, x)[1:], rtol=2e-3, atol=2e-3)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_int8_weights_are_their_own_dequantised_ones(kernel: bool, bias: bool):
    """Torch's kernel rounds inputs and scales to bf16: one part in 256; ours does not, nor does what is for many."""
    parts = make_parts(2, 32, (24, 8), bias=bias)
    product = Int8Product(parts)
    rounded = copy.deepcopy(parts)
    for linear in (linear for linears in rounded for linear in linears):
        scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        linear.weight.copy_((linear.weight / scale).round() * scale)
    for rows in (1, 5, 8, 9, 32, 33):
        x = torch.randn(2, rows, 32).bfloat16().float()
        off = {"rtol": 1e-4, "atol": 1e-4} if kernel or rows > 8 else {"rtol": 2**-7, "atol": 2e-2}
        torch.testing.assert_close(product(x), expected(rounded, x), **off)
        torch.testing.assert_close(product(x[1:], 1), expected(rounded, x)[1:], **off)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("num_in", "outs"), [(64, (128,)), (40, (24, 12)), (16, (262,))], ids=str)
def test_int4_weights_are_within_half_a_step_of_their_group(num_in: int, outs: tuple[int, ...], bias: bool):
    """Any sizes: groups that are not full and blocks of outputs that are not are filled up with zeros."""
    parts = make_parts(2, num_in, outs, bias=bias)
    product = Int4Product(parts)
    eye = torch.eye(num_in).expand(2, -1, -1)
    bare = product(eye) - product(torch.zeros_like(eye))
    for linears, rows in zip(parts, bare, strict=True):
        weight = torch.cat([linear.weight for linear in linears])
        groups = weight.t().split(32)
        steps = [(g.amax(0).clamp(min=0) - g.amin(0).clamp(max=0)).clamp(min=1e-3) / 15 for g in groups]
        allowed = torch.cat([s.expand(len(g), -1) for s, g in zip(steps, groups, strict=True)])
        off = (rows - weight.t()).abs()
        assert bool((off <= 0.6 * allowed + 2e-2 * weight.abs().max()).all())
        assert float(off.mean()) > 1e-3  # they are int4, and not what they came from
    x = torch.randn(2, 3, num_in)
    torch.testing.assert_close(product(x[1:], 1), product(x)[1:])
    torch.testing.assert_close(product(x), expected(parts, x), rtol=0.2, atol=0.3)


@pytest.mark.parametrize("form", ["half", "int8", "int4"])
def test_drafts_in_fewer_bits_are_refused_for_what_is_not_like_llama(form: Any):
    with pytest.raises(ConfigError, match=f"drafts in {form} take Llama-like specialists"):
        make_engine(make_fused(make_mixed()), drafts=("self",), draft_weights=form)


@pytest.mark.parametrize("form", ["half", "int8", "int4"])
def test_16_bit_specialists_draft_in_fewer_bits_only_with_our_kernel(kernel: bool, form: Any):
    model = make_fused(make_similar()).bfloat16()
    if kernel:
        assert make_engine(model, drafts=("self",), draft_weights=form).runner.draft_form == form
        return
    with pytest.raises(ConfigError, match=f"drafts in {form} take Llama-like specialists in fp32"):
        make_engine(model, drafts=("self",), draft_weights=form)


def test_a_copy_for_drafts_is_made_only_where_it_is_of_use(kernel: bool, monkeypatch: pytest.MonkeyPatch):
    """A rule of the processor and not a measurement."""

    def form(model: Any, **options: Any) -> str:
        return make_engine(model, **{"draft_weights": "auto", "drafts": ("self",), **options}).runner.draft_form

    model = make_fused(make_similar())
    best = "int8" if kernel else "int4"
    assert form(model) == (best if kernel or is_int4_fast() else "exact")
    assert form(model, drafts=("lookup",)) == "exact"
    assert form(make_fused(make_mixed())) == "exact"
    assert form(make_fused(make_similar()).bfloat16(), pack=True) == ("int8" if kernel else "exact")
    assert form(make_fused(make_similar()).bfloat16(), pack=False) == "exact"  # where memory is short
    if kernel or has_fbgemm():
        assert form(model, weights="half", draft_weights="half") == "exact"  # they are in half already
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert form(model) == ("int8" if kernel else "exact")


@torch.no_grad()
def test_int8_takes_any_inputs_and_without_our_kernel_only_what_torchs_does_not_read_past(kernel: bool):
    parts = make_parts(1, 24, (4,), bias=False)
    if kernel:
        x = torch.randn(1, 2, 24)
        torch.testing.assert_close(Int8Product(parts)(x), expected(parts, x), rtol=2e-2, atol=2e-2)
        return
    with pytest.raises(ConfigError, match="in sixteens and a layer has 24"):
        Int8Product(parts)


def test_a_weight_that_fp16_cannot_hold_is_refused():
    parts = make_parts(1, 4, (4,), bias=False)
    with torch.no_grad():
        parts[0][0].weight[0, 0] = 1e6
    with pytest.raises(ConfigError, match="too large for fp16"):
        HalfProduct(parts)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("form", ["half", "int8"])
def test_reduced_weights_give_nearly_the_references_distribution(form: Any):
    model = make_fused(make_similar())
    request = greedy(9, 12, 4, seed=2, max_tokens=1, log_probs=0)
    (exact,) = run(make_engine(model), request)

    (reduced,) = run(make_engine(model, weights=form), request)

    assert reduced.ids() == exact.ids()
    assert reduced.pieces[0][0].log_prob == pytest.approx(exact.pieces[0][0].log_prob, abs=0.3)


def test_reduced_weights_are_refused_for_what_is_not_like_llama():
    with pytest.raises(ConfigError, match="'math' is a GPTNeoXForCausalLM: use exact weights"):
        make_engine(make_fused(make_mixed()), weights="half")


# The model beside the engine


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("runner", ["stacked", "sequential"])
def test_the_model_goes_on_working_beside_the_engine(runner: str, pack: bool, tied: bool):
    model = make_fused(make_trio(tied=tied))
    before = twin(model)
    engine = make_engine(model, runner=runner, pack=pack)
    run(engine, greedy(7, 9, 5))

    ids = torch.randint(5, 200, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, before(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    states = model.state_dict(), before.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])
    head = model.specialists["code"].get_output_embeddings().weight
    assert (head is model.specialists["code"].get_input_embeddings().weight) == tied


def test_a_second_engine_of_the_same_model_and_the_first_both_answer():
    model = make_fused(make_trio())
    reference = twin(model)
    request = greedy(7, 9, 5, seed=1)
    first = make_engine(model, runner="sequential")
    second = make_engine(model, runner="stacked")

    for engine in (first, second, first):
        assert_answers(reference, request, run(engine, request)[0])


@pytest.mark.usefixtures("kernel")
def test_keys_and_values_are_rounded_where_the_rows_of_products_are():
    """Then they take half the memory, in the count of choices that fit, too, and our kernel reads them."""
    exact, rounded = make_engine(make_fused(make_similar())), make_engine(make_fused(make_similar()).bfloat16())
    is_rounded = few_rows.rounds(torch.bfloat16) or not weights.keeps_values(torch.empty(0, dtype=torch.bfloat16))
    for engine, dtype in ((exact, torch.float32), (rounded, torch.bfloat16 if is_rounded else torch.float32)):
        (group,) = engine.runner.groups
        assert {storage.dtype for storage in group.cache.keys} == {dtype}
        assert group.cache.bytes_per_token == sum(
            memory._bytes_per_token(model, memory._cache_type(model, engine.options, True))
            for model in engine.model.specialists.values()
        )
        layers = group.backbone.layers
        view = SlotView(group.cache, [0], None, torch.zeros(3, dtype=torch.int64), 1)
        assert layers is None or layers.takes(view, 3, 1)


def test_an_engine_of_bf16_specialists_gives_numbers_close_to_fp32():
    model = make_fused(make_similar())
    request = greedy(9, 12, 4, seed=2, max_tokens=1, log_probs=0)
    (exact,) = run(make_engine(twin(model)), request)

    (rounded,) = run(make_engine(model.bfloat16()), request)

    assert rounded.pieces[0][0].log_prob == pytest.approx(exact.pieces[0][0].log_prob, abs=0.5)


def test_a_draft_model_is_left_as_it_is():
    draft = make_model(seed=9)
    before = copy.deepcopy(draft.state_dict())
    run(make_engine(draft=draft, drafts=("model",)), greedy(7, 9, 5))
    assert all(torch.equal(value, before[key]) for key, value in draft.state_dict().items())
