"""Specialists that are adapters of one base: one copy of its weights, one forward, the same numbers as n models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from helpers import make_model, make_tokenizer
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.lora import Adapter, lora_layers
from ultrafuser.model.shared_base import share_base

peft = pytest.importorskip("peft")

NAMES = ("text", "code", "math")
KINDS = ("llama", "gemma2", "gpt_neox", "bloom")


def make_shared(kind: str = "llama", *, seed: int = 0, ranks: tuple[int, ...] = (2, 3, 2), **options: Any) -> Any:
    """A fused model whose specialists are random adapters of one base, of different ranks."""
    torch.manual_seed(seed)
    adapters = {
        name: Adapter(peft.LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False))
        for name, rank in zip(NAMES, ranks, strict=True)
    }
    specialists = share_base(make_model(kind, seed=seed, tied=True), adapters)
    return FusedForCausalLM.from_specialists(
        specialists, shared_base=True, gate_hidden_size=8, tokenizer=make_tokenizer(), **options
    )


def merged(specialist: PreTrainedModel) -> PreTrainedModel:
    """The same specialist as a plain model, merged by hand."""
    plain = copy.deepcopy(specialist)
    for place, layer in list(lora_layers(plain)):
        base = layer.get_base_layer()
        base.weight.data = base.weight.data + layer.get_delta_weight("default").to(base.weight.dtype)
        parent, _, leaf = place.rpartition(".")
        setattr(plain.get_submodule(parent), leaf, base)
    return plain


def separate(model: FusedForCausalLM) -> FusedForCausalLM:
    """n merged models with the same gate."""
    other = FusedForCausalLM.from_specialists(
        {name: merged(model.specialists[name]) for name in model.names}, gate_hidden_size=8, tokenizer=make_tokenizer()
    )
    other.fusion_gate.load_state_dict(model.fusion_gate.state_dict())
    return other


def make_views(model: FusedForCausalLM, *, columns: int = 12) -> dict[str, torch.Tensor]:
    """Two rows, each specialist's view padded on the left to another length, and labels in the last columns."""
    torch.manual_seed(5)
    response = torch.randint(5, 200, (2, 5))
    prompts = torch.randint(5, 200, (2, len(model.names), columns - 5))
    ids = torch.cat([prompts, response[:, None].expand(-1, len(model.names), -1)], dim=-1)
    mask = torch.ones_like(ids)
    for row in range(2):
        for j in range(len(model.names)):
            mask[row, j, : row + j] = 0
    mask[0, 1, 4:6] = 0  # padding may stand in the middle of a row
    labels = torch.cat([torch.full((2, columns - 5), -100), response], dim=1)
    return {"labels": labels, "specialist_input_ids": ids, "specialist_attention_mask": mask}


@pytest.mark.parametrize("kind", KINDS)
def test_one_forward_of_all_rows_equals_separate_models(kind: str):
    model = make_shared(kind)
    assert model.runs_jointly
    batch = make_views(model)

    nll, weights, _ = model.response_nll(**batch)
    expected_nll, expected_weights, _ = separate(model).response_nll(**batch)

    torch.testing.assert_close(nll, expected_nll, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weights, expected_weights, atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_adapter_and_no_weight_of_the_base():
    model, alone = make_shared(), make_shared()
    for one in (model, alone):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_("lora_" in name or name.startswith("fusion_gate"))
    alone._joins = False  # n forwards over the shared weights
    batch = make_views(model)
    for one in (model, alone):
        one.train()
        one.response_nll(**batch)[0].sum().backward()

    for (name, parameter), (_, expected) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, expected.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_checkpointed_activations_give_the_same_gradients():
    plain, checkpointed = make_shared(), make_shared()
    for specialist in checkpointed.specialists.values():
        specialist.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = make_views(plain)
    for one in (plain, checkpointed):
        one.train()
        one.response_nll(**batch)[0].sum().backward()

    for (name, parameter), (_, expected) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        if "lora_" in name:
            torch.testing.assert_close(parameter.grad, expected.grad, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 3}], ids=str)
def test_generation_with_a_cache_writes_what_separate_models_write(options: dict[str, Any]):
    model = make_shared()
    views = make_views(model)
    prompts = {
        "input_ids": views["specialist_input_ids"][:, 0],
        "specialist_input_ids": views["specialist_input_ids"],
        "specialist_attention_mask": views["specialist_attention_mask"],
    }

    written = model.generate(**prompts, max_new_tokens=8, **options)
    expected = separate(model).generate(**prompts, max_new_tokens=8, **options)

    assert torch.equal(written, expected)


def test_each_specialist_alone_answers_as_its_merged_model():
    model = make_shared()
    ids = torch.arange(5, 15)[None]
    for name in NAMES:
        model.config.solo = name
        torch.testing.assert_close(model(ids).logits, merged(model.specialists[name])(ids).logits, atol=1e-5, rtol=1e-5)


def test_the_base_is_in_memory_once():
    model = make_shared()
    plain = sum(parameter.numel() for parameter in make_model("llama", tied=True).parameters())
    adapters = sum(p.numel() for n, p in model.specialists.named_parameters() if "lora_" in n)

    assert sum(parameter.numel() for parameter in model.specialists.parameters()) == plain + adapters


def test_a_change_of_weights_or_type_is_seen_by_the_joint_forward():
    model = make_shared()
    batch = make_views(model)
    before, _, _ = model.response_nll(**batch)
    with torch.no_grad():
        next(p for n, p in model.specialists["code"].named_parameters() if "lora_B" in n).add_(0.5)
    changed, _, _ = model.response_nll(**batch)
    torch.testing.assert_close(changed, separate(model).response_nll(**batch)[0], atol=1e-5, rtol=1e-5)
    assert not torch.equal(before, changed)

    half = model.to(torch.bfloat16)
    assert half.joint_model().dtype == torch.bfloat16
    torch.testing.assert_close(half.response_nll(**batch)[0], changed, atol=0.3, rtol=0.3)
