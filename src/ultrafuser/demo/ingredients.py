"""What the demo starts from: training files, a tokenizer and a tiny untrained model, all made here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ultrafuser.chat.library import load_template
from ultrafuser.chat.messages import Conversation, Message
from ultrafuser.demo.world import Item

VOCABULARY_SIZE = 1024


def conversation(item: Item) -> Conversation:
    """A question with its reference answer."""
    return (Message("user", item.question), Message("assistant", item.answer))


def write_training_files(items: Mapping[str, Sequence[Item]], folder: Path) -> dict[str, Path]:
    """One JSONL file of `messages` records per domain."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for domain, domain_items in items.items():
        paths[domain] = folder / f"{domain}.jsonl"
        lines = (json.dumps({"messages": [m.to_dict() for m in conversation(item)]}) for item in domain_items)
        paths[domain].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def train_tokenizer(items: Mapping[str, Sequence[Item]], templates: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about a thousand tokens.

    Every digit is a token of its own. The fixed texts of the templates are one token each, so that the longest template
    costs as little time as the shortest.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for domain_items in items.values() for item in domain_items for text in (item.question, item.answer))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in _fixed_texts(templates)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def _fixed_texts(templates: Iterable[str]) -> list[str]:
    """What each template writes before and after a question."""
    mark = "\x00"
    texts = [load_template(name).render((Message("user", mark),)).split(mark) for name in templates]
    return sorted({part for parts in texts for part in parts if part.strip()})


def untrained_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of four layers and width 128 with random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            initializer_range=0.06,  # three times the usual: a width of 128 then learns within a hundred steps
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
