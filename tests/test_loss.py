"""The fused loss: against cross-entropy of all fused logits in float64, and how much it does and holds for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import make_fused, make_mixed, make_model
from ultrafuser.errors import ModelError
from ultrafuser.model import loss_terms
from ultrafuser.model.backbone import head_logits, linear_head
from ultrafuser.model.loss import LinearHead, fused_loss, fused_nll

# Largest error of loss and gradients, as a part of the largest value there or of 1: as docs/results.md states.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Case:
    """Random inputs of n heads; `trained` says of what gradients are taken."""

    def __init__(
        self,
        sizes: Sequence[int] = (8, 5, 12),
        *,
        tokens: int = 13,
        vocabulary: int = 19,
        surplus: Sequence[int] = (),
        biased: Sequence[bool] = (),
        trained: Sequence[str] = ("hiddens", "heads", "weights"),
        tied: bool = False,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        rows = [vocabulary + (surplus[i] if i < len(surplus) else 0) for i in range(len(sizes))]
        self.vocabulary = min(rows)

        def leaf(kind: str, *shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(kind in trained)

        self.heads = [leaf("heads", r, size) for r, size in zip(rows, sizes, strict=True)]
        self.biases = [leaf("heads", r) if i < len(biased) and biased[i] else None for i, r in enumerate(rows)]
        self.labels = torch.randint(0, vocabulary, (tokens,))
        self.inputs = [leaf("hiddens", tokens, size) for size in sizes]
        self.ids = torch.randint(0, vocabulary, (tokens,))
        self.tied = tied
        exact = torch.promote_types(dtype, torch.float32)
        self.scores = torch.randn(tokens, len(sizes), dtype=exact, requires_grad="weights" in trained)
        self.scale = torch.rand(tokens)

    @property
    def leaves(self) -> list[Tensor]:
        every = [*self.inputs, *self.heads, *(b for b in self.biases if b is not None), self.scores]
        return [tensor for tensor in every if tensor.requires_grad]

    def hiddens(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Hidden states; where tied, those that the head's own rows make as embeddings."""
        parts = zip(self.inputs, self.heads, strict=True)
        hiddens = [hidden * head[self.ids] if self.tied else hidden for hidden, head in parts]
        return [hidden if dtype is None else hidden.to(dtype) for hidden in hiddens]

    def loss(self, **options: Any) -> Tensor:
        weights = torch.softmax(self.scores, dim=-1)
        return fused_nll(self.hiddens(), weights, self.labels, self.linear_heads(), **options)

    def linear_heads(self) -> list[LinearHead]:
        return [LinearHead(head, bias) for head, bias in zip(self.heads, self.biases, strict=True)]

    def logits(self) -> list[Tensor]:
        """Of each specialist, in float64."""
        cut = slice(self.vocabulary)
        return [
            F.linear(hidden, head[cut].double(), None if bias is None else bias[cut].double())
            for hidden, head, bias in zip(self.hiddens(torch.float64), self.heads, self.biases, strict=True)
        ]

    def fused(self) -> Tensor:
        weights = torch.softmax(self.scores.double(), dim=-1)
        return sum(weights[:, i, None] * own for i, own in enumerate(self.logits()))

    def reference(self) -> Tensor:
        return F.cross_entropy(self.fused(), self.labels, reduction="none")


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance * max(1.0, expected.abs().max().item()), f"{error} of {expected.abs().max()}"


def assert_equal_to_reference(case: Case, dtype: torch.dtype, *, scale: Tensor | None = None, **options: Any) -> None:
    """Loss and every gradient."""
    factor = torch.ones(len(case.labels)) if scale is None else scale
    loss, expected = case.loss(**options), case.reference()
    assert_near(loss, expected, TOLERANCE[dtype])
    if case.leaves:
        actual = torch.autograd.grad((loss * factor).sum() if scale is not None else loss.sum(), case.leaves)
        wanted = torch.autograd.grad((expected * factor).sum(), case.leaves)
        for a, b in zip(actual, wanted, strict=True):
            assert_near(a, b, TOLERANCE[dtype])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_loss_and_gradients_equal_a_float64_reference(dtype: torch.dtype, data: st.DataObject):
    """Whatever the shapes, whatever is frozen, tied, biased or cut to a common vocabulary, in whatever blocks."""
    sizes = data.draw(st.lists(st.integers(1, 24), min_size=1, max_size=4))
    parts = st.lists(st.sampled_from(["hiddens", "heads", "weights"]), unique=True)
    case = Case(
        sizes,
        tokens=data.draw(st.integers(1, 30)),
        vocabulary=data.draw(st.integers(2, 50)),
        surplus=data.draw(st.lists(st.integers(0, 3), max_size=len(sizes))),
        biased=data.draw(st.lists(st.booleans(), max_size=len(sizes))),
        trained=data.draw(parts),
        tied=data.draw(st.booleans()),
        dtype=dtype,
        seed=data.draw(st.integers(0, 999)),
    )
    unequal = data.draw(st.booleans())

    with patch.object(loss_terms, "MOST_ROWS_ON_CPU", data.draw(st.sampled_from([1, 7, 1024]))):
        assert_equal_to_reference(
            case, dtype, scale=case.scale if unequal else None, chunk=data.draw(st.sampled_from([1, 4, 100]))
        )


def test_specialists_may_be_frozen_one_by_one():
    case = Case(trained=("weights",))
    case.heads[1].requires_grad_()
    case.inputs[2].requires_grad_()

    assert_equal_to_reference(case, torch.float32, chunk=4)


def test_a_second_backward_pass_gives_the_same_gradients():
    case = Case()
    loss = case.loss(chunk=4).sum()

    first = torch.autograd.grad(loss, case.leaves, retain_graph=True)

    for a, b in zip(first, torch.autograd.grad(loss, case.leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_an_empty_batch_has_no_loss_and_zero_gradients():
    case = Case(tokens=0)

    loss = case.loss()

    assert loss.shape == (0,)
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss.sum(), case.leaves))


@pytest.mark.parametrize("way", ["linear heads", "the general way"])
def test_the_heads_gradient_does_not_drift_with_the_number_of_chunks(monkeypatch: pytest.MonkeyPatch, way: str):
    """Under bf16 autocast over fp32 masters: sums over 512 chunks of one token, kept in fp32."""
    monkeypatch.setattr("ultrafuser.model.linear_loss.multiplies_bf16", lambda _: True)  # else a CPU may take fp32
    case = Case((16,), tokens=512, vocabulary=7, trained=("heads",))
    heads: list[Any] = case.linear_heads()
    if way == "the general way":
        heads = [partial(F.linear, weight=head) for head in case.heads]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused_nll(case.hiddens(), torch.softmax(case.scores, dim=-1), case.labels, heads, chunk=1)
    (gradient,) = torch.autograd.grad(loss.sum(), case.heads)

    (expected,) = torch.autograd.grad(case.reference().sum(), case.heads)
    assert gradient.dtype == torch.float32
    assert (gradient - expected).norm() < 4e-3 * expected.norm()
    products = -torch.softmax(case.fused(), dim=-1).detach()  # what sums in bf16 would do
    products[torch.arange(512), case.labels] += 1
    drifting = torch.zeros(7, 16, dtype=torch.bfloat16)
    for row, hidden in zip(products.bfloat16(), case.inputs[0].bfloat16(), strict=True):
        drifting -= row[:, None] * hidden
    assert (drifting - expected).norm() > 8e-3 * expected.norm()


def test_bf16_is_no_less_exact_than_autograd_over_all_logits():
    case = Case((64, 64, 64), tokens=64, vocabulary=300, dtype=torch.bfloat16)
    weights = torch.softmax(case.scores, dim=-1)
    parts = zip(case.inputs, case.heads, strict=True)
    naive = F.cross_entropy(sum(weights[:, i, None] * (h @ w.T).float() for i, (h, w) in enumerate(parts)), case.labels)
    exact = torch.autograd.grad(case.reference().mean(), case.leaves)

    def error(gradients: Sequence[Tensor]) -> float:
        return max(float((a - b).norm() / b.norm()) for a, b in zip(gradients, exact, strict=True))

    ours = error(torch.autograd.grad(case.loss(chunk=8).mean(), case.leaves))

    assert ours < 1.25 * error(torch.autograd.grad(naive, case.leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [("hiddens", "heads", "weights"), ("weights",), ()])
@pytest.mark.parametrize(("chunk", "rows"), [(4, 1024), (100, 5)])
def test_details_are_those_of_the_logits_and_do_not_change_the_loss(
    dtype: torch.dtype, trained: Sequence[str], chunk: int, rows: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loss_terms, "MOST_ROWS_ON_CPU", rows)  # of a head in one product
    case = Case(trained=trained, biased=(True, False), dtype=dtype)
    weights = torch.softmax(case.scores, dim=-1)

    loss = fused_loss(case.hiddens(), weights, case.labels, case.linear_heads(), chunk=chunk, details=True)

    assert_near(loss.nll, case.reference(), TOLERANCE[dtype])
    assert torch.equal(loss.hit, case.fused().argmax(dim=-1) == case.labels)
    alone = [F.cross_entropy(own, case.labels, reduction="none") for own in case.logits()]
    assert_near(loss.specialist_nll, torch.stack(alone, dim=-1), TOLERANCE[dtype])
    if case.leaves:
        wanted = torch.autograd.grad(case.reference().sum(), case.leaves)
        for a, b in zip(torch.autograd.grad(loss.nll.sum(), case.leaves), wanted, strict=True):
            assert_near(a, b, TOLERANCE[dtype])
    assert not loss.hit.requires_grad
    assert not loss.specialist_nll.requires_grad


@pytest.mark.parametrize("space", ["logits", "logprobs", "probs"])
def test_the_general_way_tells_the_same_details(space: str):
    case = Case()
    weights = torch.softmax(case.scores, dim=-1)
    linear = case.linear_heads()
    functions = [lambda hidden, head=head: head(hidden) for head in linear]

    general = fused_loss(case.hiddens(), weights, case.labels, functions, space=space, chunk=4, details=True)

    own = fused_loss(case.hiddens(), weights, case.labels, linear, details=True)
    torch.testing.assert_close(general.specialist_nll, own.specialist_nll)
    if space != "probs":
        torch.testing.assert_close(general.nll, own.nll)
        assert torch.equal(general.hit, own.hit)


class Watch(TorchDispatchMode):
    """Counts operations and notes the largest tensor that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__.rstrip("_")] += 1
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_contiguous():
                self.largest = max(self.largest, tensor.numel())
        return result

    @property
    def multiplications(self) -> int:
        return self.calls["mm"] + self.calls["addmm"]


def watch(case: Case, **options: Any) -> Watch:
    with Watch() as seen:
        weights = torch.softmax(case.scores, dim=-1)
        loss = fused_loss(case.hiddens(), weights, case.labels, case.linear_heads(), **options)
        if case.leaves:
            torch.autograd.grad(loss.nll.mean(), case.leaves)
    return seen


@pytest.mark.parametrize(
    ("trained", "each"), [((), 1), (("weights",), 1), (("hiddens", "weights"), 2), (("heads",), 2)]
)
def test_no_product_is_made_that_nobody_asked_for(trained: Sequence[str], each: int):
    """Stage 1 multiplies each head once a chunk: no P W, no gradient of a head, and no logits made twice."""
    case = Case(tokens=12, trained=trained)

    assert watch(case, chunk=4).multiplications == each * 3 * 3


def test_everything_trained_takes_three_products_of_each_head_and_details_take_no_more():
    case = Case(tokens=12)

    assert watch(case, chunk=4).multiplications == watch(case, chunk=4, details=True).multiplications == 3 * 3 * 3


@pytest.mark.parametrize("details", [False, True])
@pytest.mark.parametrize("trained", [("weights",), ("hiddens", "heads", "weights")])
def test_no_tensor_is_larger_than_the_logits_of_a_chunk(trained: Sequence[str], details: bool):
    case = Case((2, 3), tokens=100, vocabulary=200, trained=trained)

    assert watch(case, chunk=4, details=details).largest == 4 * 200


@pytest.mark.parametrize("details", [False, True])
def test_with_frozen_specialists_no_tensor_grows_with_the_vocabulary(details: bool):
    case = Case((2, 3), tokens=100, vocabulary=2000, trained=("weights",))

    with patch.object(loss_terms, "MOST_ROWS_ON_CPU", 50):
        assert watch(case, chunk=4, details=details).largest == 4 * 50


def test_of_equal_logits_the_first_is_the_likeliest_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss_terms, "MOST_ROWS_ON_CPU", 5)
    case = Case((4,), tokens=19, trained=())
    case.heads[0].zero_()
    case.labels = torch.arange(19)

    loss = fused_loss(case.hiddens(), torch.ones(19, 1), case.labels, case.linear_heads(), details=True)

    assert loss.hit is not None
    assert loss.hit.tolist() == [True] + 18 * [False]


def test_on_a_cpu_a_large_chunk_is_cut_to_what_the_cache_bears():
    case = Case((2, 3), tokens=2000, vocabulary=40)

    assert watch(case, chunk=10**6).largest == 256 * 40


@pytest.mark.parametrize("trained", [("weights",), ("hiddens", "heads", "weights")])
def test_torchs_fused_loss_is_a_back_end(trained: Sequence[str]):
    case = Case(trained=trained, biased=(False, True))

    assert_equal_to_reference(case, torch.float32, backend="torch")
    assert_equal_to_reference(case, torch.float32, backend="torch", scale=case.scale)


def test_a_back_end_that_cannot_do_it_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch):
    case = Case()
    with pytest.raises(ModelError, match="liger runs on a GPU, and this is cpu"):
        case.loss(backend="liger")
    with pytest.raises(ModelError, match="no loss backend 'flash': choose chunked, torch or liger"):
        case.loss(backend="flash")
    with pytest.raises(ModelError, match="tells no details"):
        fused_loss(case.hiddens(), case.scores, case.labels, case.linear_heads(), backend="torch", details=True)
    with pytest.raises(ModelError, match="in the space logits alone, not probs"):
        case.loss(backend="torch", space="probs")
    functions = [lambda hidden, head=head: head(hidden) for head in case.linear_heads()]
    with pytest.raises(ModelError, match="every head to be one linear layer"):
        fused_nll(case.hiddens(), case.scores, case.labels, functions, backend="torch")
    monkeypatch.delattr(F, "linear_cross_entropy")
    with pytest.raises(ModelError, match=r"torch needs torch 2\.13"):
        case.loss(backend="torch")


def test_the_shard_of_a_head_is_refused():
    """Outside the forward of its FSDP unit a head is a DTensor, whose products would be shards of other logits."""
    case = Case()
    case.heads[1].full_tensor = None

    with pytest.raises(ModelError, match="the head of specialist 1 is a shard here: compute the loss inside"):
        case.loss()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "opt", "mistral", "bloom"])
def test_a_plain_head_is_found_as_tensors(kind: str):
    specialist = make_model(kind)
    hidden = torch.randn(3, specialist.get_output_embeddings().weight.shape[1])

    head = linear_head(specialist)

    assert head is not None
    assert head.weight is specialist.get_output_embeddings().weight
    torch.testing.assert_close(head(hidden), head_logits(specialist, hidden))


@pytest.mark.parametrize(("setting", "value"), [("logit_scale", 0.25), ("logits_scaling", 8.0)])
def test_a_scaled_head_is_linear_too(setting: str, value: float):
    model = make_fused({"text": make_model("llama"), "code": make_model("llama", seed=1)})
    setattr(model.specialists["code"].config, setting, value)
    hiddens = [torch.randn(5, head.weight.shape[1]) for head in map(linear_head, model.specialists.values())]
    weights, labels = torch.softmax(torch.randn(5, 2), dim=-1), torch.randint(0, 9, (5,))
    functions = [lambda hidden, name=name: model.head(name, hidden) for name in model.names]

    loss = fused_nll(hiddens, weights, labels, [model.loss_head(name) for name in model.names])

    torch.testing.assert_close(loss, fused_nll(hiddens, weights, labels, functions))


def test_a_head_that_does_more_goes_the_general_way():
    """Soft capping, a hook, a replaced forward, a layer of another class."""
    capped, hooked, replaced, other = make_model("gemma2"), *(make_model("llama") for _ in range(3))
    capped.config.final_logit_softcapping = 30.0
    hooked.get_output_embeddings().register_forward_hook(lambda *_: None)
    replaced.get_output_embeddings().forward = lambda hidden: hidden
    weight = other.get_output_embeddings().weight
    other.set_output_embeddings(type("Lora", (torch.nn.Linear,), {})(*reversed(weight.shape), bias=False))

    assert [linear_head(specialist) for specialist in (capped, hooked, replaced, other)] == [None] * 4


@pytest.mark.parametrize(
    "specialists", [make_mixed, lambda: {"text": make_model("llama"), "code": make_model("gemma2")}]
)
def test_the_details_of_a_model_are_each_specialists_own_loss(specialists: Any):
    model = make_fused(specialists(), templates=None)
    ids = torch.randint(5, 60, (2, 9))
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    views = {"specialist_input_ids": ids[:, None].expand(-1, 2, -1), "specialist_attention_mask": torch.ones(2, 2, 9)}
    views = {name: view[:, :1].expand(-1, len(model.names), -1).long() for name, view in views.items()}

    loss, _, predicting = model.response_loss(labels, **views, details=True)

    output = model(**views).logits[predicting]
    torch.testing.assert_close(loss.hit, output.argmax(dim=-1) == labels[:, 3:].flatten())
    for i, specialist in enumerate(model.specialists.values()):
        alone = F.cross_entropy(specialist(ids).logits[predicting], labels[:, 3:].flatten(), reduction="none")
        torch.testing.assert_close(loss.specialist_nll[:, i], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss.nll, model.response_nll(labels, **views)[0])
