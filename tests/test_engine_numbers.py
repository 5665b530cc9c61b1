"""Numbers that are none, in the middle of an answer: one clear error whatever the layout of weights, never a token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine_helpers import always_draft, assert_answers, greedy, make_engine, make_similar, reference_answer, run, twin
from helpers import make_fused
from ultrafuser.engine.engine import Engine
from ultrafuser.engine.weights import ExactProduct, PackedProduct, can_pack
from ultrafuser.model.generator import NOT_A_NUMBER

Saved = list[tuple[torch.Tensor, torch.Tensor]]


def product_of(engine: Engine, part: str) -> Any:
    """The head's product, or that which ends the first layer."""
    backbone: Any = engine.runner.groups[0].backbone
    return backbone.head if part == "head" else backbone.down[0]


def break_product(product: Any, value: float) -> list[torch.Tensor]:
    """Fill the weights of all specialists, in every layout of them; gives back what was there."""
    if isinstance(product, ExactProduct):
        before = [product.weight.clone()]
        product.weight.fill_(value)
        return before
    assert isinstance(product, PackedProduct)
    before = break_product(product.exact, value)
    pack = torch.ops.mkldnn._reorder_linear_weight
    product.packed = [
        (pack(part.contiguous(), 16), bias)
        for part, (_, bias) in zip(product.exact.weight, product.packed, strict=True)
    ]
    return before


def mend_product(product: Any, before: list[torch.Tensor]) -> None:
    """Undo `break_product`."""
    exact = product if isinstance(product, ExactProduct) else product.exact
    exact.weight.copy_(before[0])
    if isinstance(product, PackedProduct):
        pack = torch.ops.mkldnn._reorder_linear_weight
        product.packed = [
            (pack(part.contiguous(), 16), bias) for part, (_, bias) in zip(exact.weight, product.packed, strict=True)
        ]


@torch.no_grad()
@pytest.mark.parametrize("drafts", [(), ("self",)])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("part", ["head", "layer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_break_in_the_middle_are_one_clear_error(value: float, part: str, pack: bool, drafts: Any):
    """With drafts several rows are read at once, and so by the second layout where there is one."""
    model = make_fused(make_similar())
    reference = twin(model)
    engine = make_engine(model, pack=pack, drafts=drafts, draft_weights="auto", runner="stacked")
    if drafts:
        always_draft(engine, *drafts, lengths=(3,))
    request = greedy(7, 9, 5, max_tokens=20, ignore_end=True)
    product = product_of(engine, part)
    assert isinstance(product, PackedProduct) == (pack and can_pack(model.specialists["text"].lm_head.weight))
    before: list[torch.Tensor] = []

    def break_it(step: int) -> None:
        if step == 3:
            before.extend(break_product(product, value))

    (heard,) = run(engine, request, before_step=break_it)

    assert (heard.reasons, heard.errors) == (["error"], [NOT_A_NUMBER])
    written = heard.ids()
    assert 1 <= len(written) < 20
    assert written == reference_answer(reference, request).ids[: len(written)]
    mend_product(product, before)
    assert_answers(reference, request, run(engine, request)[0])
