"""Tiny specialists on disk for tests: a byte-level tokenizer and a Llama of two layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<s>", "</s>", "<|im_end|>")


def make_tokenizer(*, swap: bool = False, eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """One token per byte and four special tokens; `swap` exchanges the ids of `a` and `b`."""
    tokens = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    if swap:
        tokens = [{"a": "b", "b": "a"}.get(token, token) for token in tokens]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    build: Any = PreTrainedTokenizerFast
    return build(  # type: ignore[no-any-return]
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=eos,
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


NUM_TOKENS = len(make_tokenizer())


def save_specialist(
    folder: Path, *, tokenizer: PreTrainedTokenizerFast | None = None, licence: str | None = "mit", **config: Any
) -> Path:
    """A model folder as `save_pretrained` writes it, with a model card."""
    settings: dict[str, Any] = {
        "vocab_size": NUM_TOKENS,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    LlamaForCausalLM(LlamaConfig(**(settings | config))).save_pretrained(folder)
    (tokenizer if tokenizer is not None else make_tokenizer()).save_pretrained(folder)
    if licence is not None:
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n# A model\n", encoding="utf-8")
    return folder
