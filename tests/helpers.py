"""Tiny seeded models, a tokenizer, and the obvious way to do what the fused model does quickly.

The reference calls each specialist's own forward on its own unpadded ids, without a cache, and fuses by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import AutoConfig

from ultrafuser.model.fused import FusedForCausalLM

# Tensors this small gain nothing from a second thread, and on a busy machine every operation waits for it.
torch.set_num_threads(1)

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
# GGUF files need a merge; this one, of the bytes 0 and 1, is in no text.
MERGE = ("Ā", "ā")
VOCAB_SIZE = len(SPECIAL_TOKENS) + 256 + 1
PAPER_TEMPLATES = ("ultralm", "codellama", "wizardmath")


def make_tokenizer(
    *, swap: tuple[str, str] | None = None, merges: Sequence[tuple[str, str]] = (MERGE,)
) -> PreTrainedTokenizerFast:
    """One token per byte, and one for each of the `merges`; `swap` exchanges the ids of two tokens."""
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if swap is not None:
        a, b = swap
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
    )


_SIZES: dict[str, Callable[[int], dict[str, Any]]] = {
    "llama": lambda h: {
        "hidden_size": h,
        "intermediate_size": 2 * h,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "gpt_neox": lambda h: {"hidden_size": h, "intermediate_size": 2 * h, "num_attention_heads": 2},
    "gpt2": lambda h: {"n_embd": h, "n_head": 2, "n_positions": 512},
    "opt": lambda h: {"hidden_size": h, "ffn_dim": 2 * h, "num_attention_heads": 2, "max_position_embeddings": 512},
    "bloom": lambda h: {"hidden_size": h, "n_head": 2},
}
_SIZES["qwen2"] = _SIZES["mistral"] = _SIZES["llama"]
_SIZES["gemma2"] = lambda h: {**_SIZES["llama"](h), "head_dim": h // 2, "query_pre_attn_scalar": h // 2}


def make_model(
    kind: str = "llama",
    *,
    seed: int = 0,
    hidden_size: int = 16,
    tied: bool = False,
    vocab_size: int = VOCAB_SIZE,
    **more: Any,
) -> PreTrainedModel:
    """A two-layer model with weights large enough that its answers differ from token to token."""
    layers = "n_layer" if kind in ("gpt2", "bloom") else "num_hidden_layers"
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    values = {layers: 2, "vocab_size": vocab_size, "tie_word_embeddings": tied, **ends}
    config = AutoConfig.for_model(kind, **{**values, **_SIZES[kind](hidden_size), **more})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.5)
                elif "bias" in name:
                    parameter.normal_(0.0, 0.1)
    return model.eval()


def make_trio(*, tied: bool = False) -> dict[str, PreTrainedModel]:
    """Three specialists of one architecture and size, as in the paper."""
    return {name: make_model(seed=seed, tied=tied) for seed, name in enumerate(("text", "code", "math"))}


def make_mixed() -> dict[str, PreTrainedModel]:
    """Three architectures and three sizes; one of them ties its head."""
    return {
        "text": make_model("llama", seed=0, hidden_size=16),
        "code": make_model("qwen2", seed=1, hidden_size=24, tied=True),
        "math": make_model("gpt_neox", seed=2, hidden_size=8),
    }


def make_fused(
    specialists: dict[str, PreTrainedModel] | None = None, *, loud: bool = True, **options: Any
) -> FusedForCausalLM:
    """A fused model with the paper's templates; `loud` makes its gate prefer somebody."""
    specialists = make_trio() if specialists is None else specialists
    defaults: dict[str, Any] = {
        "templates": PAPER_TEMPLATES[: len(specialists)],
        "tokenizer": make_tokenizer(),
        "gate_hidden_size": 8,
    }
    fused = FusedForCausalLM.from_specialists(specialists, **{**defaults, **options})
    if loud:
        with torch.no_grad():
            for parameter in fused.fusion_gate.parameters():
                parameter.mul_(3.0)
    return fused


def save_specialist(model: PreTrainedModel, folder: Path, *, tokenizer: Any = None) -> Path:
    """A folder as it comes from the hub."""
    model.save_pretrained(folder)
    (tokenizer if tokenizer is not None else make_tokenizer()).save_pretrained(folder)
    return folder


def reference_scores(model: FusedForCausalLM, hiddens: Sequence[Tensor]) -> Tensor:
    """The gate by hand: [..., H] of each specialist to [..., N]."""
    scores = []
    gate = model.fusion_gate
    if next(gate.parameters()).device != hiddens[0].device:
        gate = copy.deepcopy(gate).to(hiddens[0].device)
    for name, hidden in zip(model.names, hiddens, strict=True):
        if name in gate.projections:
            projection = gate.projections[name]
            hidden = hidden @ projection.weight.T + projection.bias
        first, _, second = gate.layers
        scores.append((torch.relu(hidden @ first.weight.T + first.bias) @ second.weight.T + second.bias).squeeze(-1))
    return torch.stack(scores, dim=-1)


@torch.no_grad()
def reference_step(model: FusedForCausalLM, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Fused logits [V] and weights [N] after the last token of each specialist's own row."""
    outputs = [
        specialist(input_ids=torch.tensor([list(row)]), use_cache=False, output_hidden_states=True)
        for specialist, row in zip(model.specialists.values(), rows, strict=True)
    ]
    weights = torch.softmax(reference_scores(model, [output.hidden_states[-1][0, -1] for output in outputs]), dim=-1)
    logits = torch.stack([output.logits[0, -1] for output in outputs])
    return (weights[:, None] * logits).sum(dim=0), weights


def reference_greedy(
    model: FusedForCausalLM, prompts: Sequence[Sequence[int]], *, max_tokens: int, stops: Sequence[int] = ()
) -> list[int]:
    """Greedy answer to one prompt per specialist, unpadded and uncached; a stop token ends it and is included."""
    response: list[int] = []
    while len(response) < max_tokens and not (response and response[-1] in stops):
        logits, _ = reference_step(model, [[*prompt, *response] for prompt in prompts])
        response.append(int(logits.argmax()))
    return response
