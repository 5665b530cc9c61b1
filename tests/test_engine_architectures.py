"""Which architectures the engine runs, each against its own plain forward; what it cannot run it refuses by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import AutoConfig

from engine_helpers import CONTEXT, always_draft, assert_answers, greedy, make_engine, run, twin
from helpers import VOCAB_SIZE, make_fused, make_model
from ultrafuser.engine import few_rows
from ultrafuser.engine.llama import LlamaStack, can_stack, is_llama_like
from ultrafuser.engine.proof import Proof, ask_models, check_backbone
from ultrafuser.engine.slots import SlotCache
from ultrafuser.errors import ConfigError, ModelError

REQUESTS = [greedy(23, 9, seed=1, max_tokens=8), greedy(4, 30, seed=2, max_tokens=5), greedy(1, 2, seed=3)]
WINDOW = {"sliding_window": 8}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tied": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, longer by scaling": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {}),
    "mistral with a window": ("mistral", WINDOW),
    "gpt_neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
    "gemma2 with a window": ("gemma2", WINDOW),
}


def make_qwen3(**more: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model("qwen3", num_hidden_layers=2, vocab_size=VOCAB_SIZE, head_dim=8, **{**sizes, **more})
    torch.manual_seed(more.get("seed", 1))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0 if parameter.dim() > 1 else 1.0, 0.5)
    return model.eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_mask_is_right_for_every_kind_of_attention(attention: str):
    parts = {"text": make_model("gpt_neox"), "code": make_model("opt", seed=1)}
    for part in parts.values():
        part.set_attn_implementation(attention)
    model = make_fused(parts)
    reference = twin(model)

    for request, heard in zip(REQUESTS, run(make_engine(model, chunk=7), *REQUESTS), strict=True):
        assert_answers(reference, request, heard)


def make_any(kind: str, **more: Any) -> Any:
    return make_qwen3(**more) if kind == "qwen3" else make_model(kind, seed=1, **more)


@pytest.mark.parametrize(("kind", "more"), KINDS.values(), ids=KINDS.keys())
def test_an_architecture_answers_as_the_plain_loop_in_a_batch_in_chunks_and_with_drafts(
    kind: str, more: dict[str, Any]
):
    model = make_fused({"text": make_model("llama", seed=5), "code": make_any(kind, **more)})
    reference = twin(model)
    for drafts in ((), ("self", "lookup")):
        engine = make_engine(model, chunk=7, drafts=drafts, max_draft_choices=4, runner="sequential")
        if drafts:
            always_draft(engine, *drafts)
        for request, heard in zip(REQUESTS, run(engine, *REQUESTS), strict=True):
            assert_answers(reference, request, heard)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_equals_of_a_llama_like_architecture_answer_as_the_plain_loop_in_a_stack(kind: str):
    more = WINDOW if kind == "mistral" else {}
    parts = {"text": make_any(kind, **more), "code": make_any(kind, **more)}
    with torch.no_grad():
        for parameter in parts["code"].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = make_fused(parts)
    reference = twin(model)
    engine = make_engine(model, runner="stacked", chunk=7)

    assert [group.views for group in engine.runner.groups] == [[0, 1]]
    for request, heard in zip(REQUESTS, run(engine, *REQUESTS), strict=True):
        assert_answers(reference, request, heard)


@pytest.mark.skipif(not few_rows.has_kernel(), reason=f"no kernel: {few_rows.why_missing()}")
@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_pass_of_few_rows_is_that_of_torch(kind: str, monkeypatch: pytest.MonkeyPatch):
    """Biases, normed heads and a window included; more rows than the kernels take go the other way anyway."""
    more = WINDOW if kind == "mistral" else {"attention_bias": True} if kind == "llama" else {}
    models = [make_any(kind, **more), make_any(kind, **more)]
    for parameter in models[1].parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    stack = LlamaStack(models, length=64)
    ids = torch.randint(5, 200, (2, 2, 7))
    hidden = []
    for has_kernel in (True, False):
        monkeypatch.setattr(few_rows, "has_kernel", lambda told=has_kernel: told)
        cache = SlotCache(2, 3, 64, stack.kv_heads, dtype=torch.float32, device=torch.device("cpu"))
        stack.hidden(ids, torch.zeros(2, 2, dtype=torch.long), cache, [2, 0])
        both = stack.hidden(ids[:, :, :3], torch.tensor([[7, 5], [4, 7]]), cache, [2, 0])
        one = stack.hidden(ids[1:, :, :1], torch.tensor([[7, 8]]), cache, [2, 0], member=1)
        hidden.append((both, one))
    torch.testing.assert_close(hidden[0], hidden[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bloom", "falcon", "gpt_neo", "mamba", "recurrent_gemma", "rwkv"])
def test_an_architecture_that_the_engine_cannot_run_is_refused_by_name(kind: str):
    """What keeps other things than keys and values, or counts columns for positions, would answer wrongly."""
    model = make_fused({"text": make_model("llama"), "code": make_other(kind)})

    with pytest.raises(ModelError, match=r"^specialist 'code' is a \w+,.* [uU]se FusedGenerator"):
        make_engine(model)


def make_other(kind: str) -> Any:
    if kind == "bloom":
        return make_model("bloom", seed=1)
    sizes = {
        "mamba": {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
        "rwkv": {"hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2},
        "recurrent_gemma": {
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        },
        "gpt_neo": {
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
        },
        "falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "alibi": True},
    }
    config = AutoConfig.for_model(kind, vocab_size=VOCAB_SIZE, **sizes[kind])
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_backbone_that_computes_something_else_is_refused():
    model, other = make_model("llama", seed=1), make_model("llama", seed=2)
    stack = LlamaStack([other], length=CONTEXT)
    cache = SlotCache(1, 2, CONTEXT, stack.kv_heads, dtype=torch.float32, device=model.device)

    def say(asked: PreTrainedModel) -> Proof:
        return ask_models([asked], ["text"], num_slots=2, length=CONTEXT)

    check_backbone(stack, cache, say(other), exact=True)
    with pytest.raises(ModelError, match=r"specialist 'text' is a LlamaForCausalLM, .*logits off by \d"):
        check_backbone(stack, cache, say(model), exact=True)


def test_the_stacked_runner_is_refused_for_specialists_that_differ():
    for parts in (
        {"text": make_model("llama"), "code": make_model("llama", hidden_size=24)},
        {"text": make_model("llama"), "code": make_model("gpt2")},
        {"text": make_model("llama")},
    ):
        with pytest.raises(ConfigError, match="cannot be stacked"):
            make_engine(make_fused(parts), runner="stacked")


def test_equals_are_those_of_one_kind_shape_and_window():
    a, b = make_model("llama", seed=1), make_model("llama", seed=2)
    assert can_stack([a, b])
    assert not can_stack([a, make_model("qwen2")])
    assert not can_stack([a, make_model("llama", hidden_size=24)])
    assert not can_stack([make_model("mistral"), make_model("mistral", **WINDOW)])
    assert not can_stack([a, make_model("llama", rms_norm_eps=1e-3)])


def test_variants_of_llama_that_change_its_formula_are_not_taken_for_llama():
    assert is_llama_like(make_model("llama"))
    assert not is_llama_like(make_model("llama", hidden_act="gelu"))
    assert not is_llama_like(make_model("gpt_neox"))
    assert not is_llama_like(make_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0}))
