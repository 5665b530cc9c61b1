"""Specialists of one base in one pass: the engine's answers are those of separate models with their adapters merged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from engine_helpers import (
    CONTEXT,
    DEVICE,
    ON_CPU,
    Heard,
    always_draft,
    assert_answers,
    finish,
    greedy,
    make_engine,
    random_prompts,
    reference_answer,
    run,
)
from helpers import VOCAB_SIZE, make_fused, make_model
from ultrafuser.engine import few_rows
from ultrafuser.engine.backbones import ModelBackbone
from ultrafuser.engine.llama import LlamaStack
from ultrafuser.engine.low_rank import LowRank
from ultrafuser.engine.memory import fit_slots, may_pack
from ultrafuser.engine.narrow import keeps_values
from ultrafuser.engine.options import EngineOptions
from ultrafuser.engine.requests import GenerationRequest
from ultrafuser.engine.shared import SharedStack
from ultrafuser.errors import ModelError
from ultrafuser.generation import SamplingParams
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.lora import Adapter, lora_layers
from ultrafuser.model.shared_base import share_base

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Ranks differ, and so do the layers that have an adapter.
WISHES: dict[str, tuple[int, tuple[str, ...]]] = {
    "text": (4, ALL),
    "code": (2, ("q_proj", "v_proj", "up_proj")),
    "math": (3, ALL),
}
MIX = (
    greedy(7, 21, 12, seed=1, max_tokens=12),
    greedy(30, 5, 9, seed=2, max_tokens=6),
    greedy(2, 3, 1, seed=3, max_tokens=14),
    greedy(11, 11, 11, seed=5, max_tokens=5),
)


def make_adapters(
    kind: str = "llama", *, base: PreTrainedModel | None = None, size: float = 0.1, wishes: Any = WISHES, **options: Any
) -> dict[str, PreTrainedModel]:
    """Specialists of one base that nearly agree."""
    adapters = {
        name: Adapter(LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=list(targets)))
        for name, (rank, targets) in wishes.items()
    }
    models = share_base(make_model(kind, seed=0, **options) if base is None else base, adapters)
    generator = torch.Generator().manual_seed(1)
    for model in models.values():
        for _, layer in lora_layers(model):
            for linear in (layer.lora_A["default"], layer.lora_B["default"]):
                linear.weight.data.normal_(0.0, size, generator=generator)
    return models


def make_shared(models: dict[str, PreTrainedModel], **options: Any) -> FusedForCausalLM:
    return make_fused(models, shared_base=True, **options)


def merged(model: FusedForCausalLM) -> FusedForCausalLM:
    """n separate ordinary models, each with its adapter added to its weights, and the same gate."""
    separate = {}
    for name, specialist in model.specialists.items():
        plain = make_model(
            specialist.config.model_type,
            seed=0,
            vocab_size=specialist.config.vocab_size,
            tied=specialist.config.tie_word_embeddings,
        )
        state = {k.replace(".base_layer", ""): v for k, v in specialist.state_dict().items() if "lora_" not in k}
        plain.load_state_dict(state)
        for place, layer in lora_layers(specialist):
            plain.get_submodule(place).weight.data += layer.get_delta_weight("default").cpu()
        separate[name] = plain
    fused = make_fused(separate, loud=False, fusion_space=model.config.fusion_space, weighting=model.config.weighting)
    fused.fusion_gate.load_state_dict(model.fusion_gate.state_dict())
    return fused


@pytest.fixture(scope="module")
def model() -> FusedForCausalLM:
    return make_shared(make_adapters())


@pytest.fixture(scope="module")
def reference(model: FusedForCausalLM) -> FusedForCausalLM:
    return merged(model)


@pytest.mark.parametrize("chunk", [3, 16])
@pytest.mark.parametrize("pack", [False, True])
def test_an_answer_alone_is_that_of_separate_models(model: Any, reference: Any, chunk: int, pack: bool):
    engine = make_engine(model, chunk=chunk, pack=pack)
    (group,) = engine.runner.groups
    assert isinstance(group.backbone, SharedStack)
    for request in MIX[:2]:
        assert_answers(reference, request, run(engine, request)[0])


def test_prompts_through_adapters_of_one_rank_are_those_of_separate_models():
    """Blocks of 48 rows, which no kernel takes: there one batched product adds what equal ranks say."""
    fused = make_shared(make_adapters(wishes=dict.fromkeys(WISHES, (3, ALL))))
    reference = merged(fused)
    engine = make_engine(fused, chunk=16)
    for request in (
        greedy(40, 33, 37, seed=8, max_tokens=4),
        greedy(40, 33, 37, seed=8, max_tokens=4, without=("code",)),
    ):
        assert_answers(reference, request, run(engine, request)[0])


@pytest.mark.parametrize(
    ("kinds", "form"),
    [
        ((), "exact"),
        (("lookup",), "exact"),
        (("self",), "exact"),
        pytest.param(("self",), "int4", marks=ON_CPU),
        pytest.param(("lookup", "self", "model"), "half", marks=ON_CPU),
    ],
    ids=str,
)
def test_answers_in_a_mix_with_every_kind_of_draft_are_those_of_separate_models(
    model: Any, reference: Any, kinds: Any, form: Any
):
    engine = make_engine(
        model, draft=make_model(seed=9), drafts=kinds, draft_weights=form, max_draft_choices=4, chunk=3, max_choices=3
    )
    if kinds:
        always_draft(engine, *kinds)

    for request, heard in zip(MIX, run(engine, *MIX), strict=True):
        assert_answers(reference, request, heard)

    assert (engine.stats().drafted_tokens > 0) == bool(kinds)


def test_who_cancels_disturbs_nobody(model: Any, reference: Any):
    engine = make_engine(model, max_choices=3)
    heard = [Heard() for _ in MIX]
    choices = [engine.add(request, listener) for request, listener in zip(MIX, heard, strict=True)]

    def leave(number: int) -> None:
        if number == 4:
            choices[0][0].cancelled = True

    finish(engine, leave)

    assert heard[0].reasons == ["cancelled"]
    for request, listener in list(zip(MIX, heard, strict=True))[1:]:
        assert_answers(reference, request, listener)


@pytest.mark.parametrize("more", [{"without": ("code",)}, {"weights": {"text": 0.3, "math": 0.7}}], ids=str)
def test_a_request_with_weights_of_its_own_is_answered_as_by_separate_models(model: Any, reference: Any, more: Any):
    request = greedy(9, 12, 4, seed=2, max_tokens=10, **more)
    assert_answers(reference, request, run(make_engine(model), request)[0])


@pytest.mark.parametrize("options", [{"solo": "math"}, {"fusion_space": "probs"}, {"weighting": "perplexity"}], ids=str)
def test_other_ways_of_fusing_are_those_of_separate_models(model: Any, options: dict[str, str]):
    changed = copy.deepcopy(model)
    for name, value in options.items():
        setattr(changed.config, name, value)
    other = merged(changed)
    other.config.solo = changed.config.solo
    request = greedy(9, 12, 4, seed=4, max_tokens=8)

    assert_answers(other, request, run(make_engine(changed), request)[0])


def test_log_probabilities_are_those_of_separate_models(model: Any, reference: Any):
    (ids,) = random_prompts(9, seed=2)
    params = SamplingParams(max_tokens=4, log_probs=2)
    request = GenerationRequest((ids,) * 3, params, score_prompt=True)
    (mine,), (theirs,) = run(make_engine(model), request), run(make_engine(reference), request)
    for a, b in zip([*mine.prompt[1:], *mine.pieces[0]], [*theirs.prompt[1:], *theirs.pieces[0]], strict=True):
        assert a.log_prob == pytest.approx(b.log_prob, abs=1e-3)
        assert [i for i, _ in a.top] == [i for i, _ in b.top]


def test_skipping_catches_up_over_a_shared_base(model: Any):
    engine = make_engine(model, skip_below=0.34)
    (heard,) = run(engine, greedy(9, 12, 4, seed=2, max_tokens=40, ignore_end=True))
    assert len(heard.ids()) == 40
    assert engine.stats().skipped_passes > 0


def make_qwen3() -> PreTrainedModel:
    """A base whose queries and keys are normalised."""
    config = Qwen3Config(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_hidden_layers=2,
        vocab_size=VOCAB_SIZE,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).eval()


@pytest.mark.parametrize(
    "make_base", [lambda: make_model("qwen2", seed=0, tied=True), make_qwen3], ids=["qwen2", "qwen3"]
)
def test_other_llama_like_bases_run_together_too(make_base: Any):
    fused = make_shared(make_adapters(base=make_base()))
    engine = make_engine(fused)
    assert isinstance(engine.runner.groups[0].backbone, SharedStack)
    request = greedy(9, 12, 4, seed=2, max_tokens=6)
    assert_answers(fused, request, run(engine, request)[0])


def test_adapters_of_an_architecture_that_the_lean_forward_does_not_know_run_one_after_another():
    targets = ("query_key_value", "dense_h_to_4h")
    fused = make_shared(
        make_adapters("gpt_neox", wishes={"text": (4, targets), "code": (2, targets), "math": (3, targets)})
    )
    engine = make_engine(fused)
    assert [type(group.backbone) for group in engine.runner.groups] == [ModelBackbone] * 3
    request = greedy(9, 12, 4, seed=2, max_tokens=6)
    assert_answers(merged(fused), request, run(engine, request)[0])


def test_the_sequential_runner_holds_the_base_once_too(model: Any, reference: Any):
    engine = make_engine(model, runner="sequential")
    assert [type(group.backbone) for group in engine.runner.groups] == [ModelBackbone] * 3
    assert_answers(reference, MIX[0], run(engine, MIX[0])[0])


# Memory


def test_the_base_is_counted_once(model: Any):
    base = make_model(seed=0)
    one = LlamaStack([base], length=CONTEXT, pack=False).weight_bytes
    adapters = sum(
        p.numel() * 4 for part in model.specialists.values() for n, p in part.named_parameters() if "lora_" in n
    )

    engine = make_engine(copy.deepcopy(model), pack=False)

    assert engine.weight_bytes == one + adapters
    assert adapters > 0


def test_exact_weights_are_in_memory_once_and_the_model_goes_on_working(model: Any):
    mine, before = copy.deepcopy(model), copy.deepcopy(model)
    make_engine(mine, pack=False)
    ids = torch.randint(5, 200, (2, 9)).to(DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(
            mine(input_ids=ids).logits, before.to(DEVICE)(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in mine.specialists.parameters()}
    distinct = {id(p): p.numel() * 4 for p in mine.specialists.parameters()}
    assert sum(storages.values()) == sum(distinct.values())


def test_copies_of_a_shared_base_are_counted_once_when_slots_are_fitted(model: Any, monkeypatch: pytest.MonkeyPatch):
    from ultrafuser.engine import memory

    size = 4 * sum({id(p): p.numel() for p in model.specialists.parameters()}.values())
    monkeypatch.setattr(memory, "_machine_bytes", lambda name: 4 * size if name == "MemTotal" else 0)
    assert may_pack(model, EngineOptions())
    assert fit_slots(model, EngineOptions(max_context=64, cache_bytes=10**6))[1] > 0


@ON_CPU
@pytest.mark.parametrize("form", ["exact", "half", "int8"])
def test_weights_given_back_are_held_by_nobody(form: Any):
    mine = make_shared(make_adapters()).bfloat16()
    is_copied = keeps_values(next(mine.parameters())) and not few_rows.has_kernel()
    request = greedy(9, 12, 4, seed=2, max_tokens=3)
    (heard,) = run(make_engine(copy.deepcopy(mine), weights=form), request)
    engine = make_engine(mine, weights=form, release_model=True)
    if form != "exact" or is_copied:
        assert all(not layer.base_layer.weight.numel() for _, layer in lora_layers(mine.specialists["math"]))
    assert run(engine, request)[0].ids() == heard.ids()


# 16 bits


@ON_CPU
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_16_bit_specialists_compute_what_the_same_values_in_fp32_do(dtype: torch.dtype):
    rounded = make_shared(make_adapters())
    for parameter in rounded.specialists.parameters():
        parameter.data = parameter.data.to(dtype)
    wide = copy.deepcopy(rounded)
    for parameter in wide.specialists.parameters():
        parameter.data = parameter.data.float()
    request = greedy(9, 12, 4, seed=2, max_tokens=8)
    if not keeps_values(next(rounded.parameters())):
        pytest.skip("without our kernel bf16 is left to a processor that multiplies it")

    engine = make_engine(rounded, chunk=8)

    stack = engine.runner.groups[0].backbone
    assert stack.compute_dtype == torch.float32
    (heard,) = run(engine, request)
    if not few_rows.rounds(dtype):
        assert_answers(merged(wide), request, heard)
        return
    expected = reference_answer(merged(wide), request)
    assert heard.ids() == expected.ids
    torch.testing.assert_close(heard.weights(), torch.stack(expected.weights), rtol=0, atol=5e-2)


# What does not fit


def test_an_adapter_of_another_base_is_refused_in_one_line():
    adapter = next(iter(lora_layers(make_adapters(hidden_size=24)["text"])))
    place, layer = adapter
    state = {f"{place}.lora_A": layer.lora_A["default"].weight, f"{place}.lora_B": layer.lora_B["default"].weight}
    config = LoraConfig(r=4, target_modules=[place.rsplit(".", 1)[-1]], layers_to_transform=[0])
    with pytest.raises(ModelError, match="belongs to another base") as caught:
        share_base(make_model(seed=0), {"text": Adapter(config, state)})
    assert "\n" not in str(caught.value)


def test_the_proof_finds_an_adapter_that_is_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LowRank, "add_to", lambda *_: None)
    monkeypatch.setattr(LowRank, "adapters", None)
    with pytest.raises(ModelError, match="logits off by"):
        make_engine(make_shared(make_adapters(size=0.3)))
