"""A request that gives each specialist its own prompt: how a client writes it, and how the server reads it.

vLLM takes one prompt a request. The others travel in `vllm_xargs`, which holds flat lists: the lengths of all prompts
in the order of the specialists, and their ids one after another. The request's own prompt is the longest of them.
Needs no vLLM: clients import it, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ultrafuser.alignment.encode import Encoder
from ultrafuser.chat.messages import Conversation
from ultrafuser.errors import ModelError, RequestError
from ultrafuser.model.build import read_templates
from ultrafuser.model.configuration import FusedConfig
from ultrafuser.vllm_plugin.weights import running_names

LENGTHS = "prompt_lengths"
IDS = "prompt_ids"
OPTION = "own_prompts"  # in --additional-config of the server
HOW_TO_START = f"""vllm serve MODEL --additional-config '{{"{OPTION}": true}}'"""

Prompts = tuple[tuple[int, ...], ...]


def prompt_encoder(folder: str | Path) -> Encoder:
    """What writes a conversation in every specialist's own template, from a model folder, without its weights.

    Args:
        folder: A model folder or hub id, full or gate-only.

    Raises:
        ModelError: The model was built without templates.
        OSError: There is no such folder or file.
    """
    config = FusedConfig.from_pretrained(str(folder))
    own = dict(zip(config.names, read_templates(config), strict=False))
    if not own:
        raise ModelError(f"{folder} has no templates: all its specialists read one prompt, send that one")
    return Encoder(AutoTokenizer.from_pretrained(str(folder)), [own[name] for name in running_names(config)])


def vllm_request(encoder: Encoder, conversation: Conversation) -> dict[str, Any]:
    """The arguments that make a completion of the openai client read each specialist's own prompt.

    `client.completions.create(model=..., max_tokens=..., **vllm_request(encoder, conversation))`

    Args:
        encoder: Of the model, by `prompt_encoder`.
        conversation: Ends with a user message.

    Returns:
        `prompt`, the longest prompt's ids, and `extra_body`.

    Raises:
        DataError: It does not end with a user message.
        TemplateError: A template cannot write it.
    """
    prompts = [list(row) for row in encoder.encode_prompt(conversation)]
    return {
        "prompt": max(prompts, key=len),
        "extra_body": {"vllm_xargs": write_prompts(prompts)},
    }


def write_prompts(prompts: Sequence[Sequence[int]]) -> dict[str, list[int]]:
    """Prompts as `vllm_xargs`.

    Args:
        prompts: Ids, one row per specialist, in order.
    """
    return {LENGTHS: [len(row) for row in prompts], IDS: [token for row in prompts for token in row]}


def read_prompts(arguments: Mapping[str, Any] | None, *, num_specialists: int, vocab_size: int) -> Prompts | None:
    """The prompts of a request's `vllm_xargs`; None where it brings none, and all read the request's own.

    Args:
        arguments: As vLLM hands them on; others than ours are left alone.
        num_specialists: That run; 0 where the server was not started for own prompts.
        vocab_size: Ids are below it.

    Raises:
        RequestError: A list is missing or damaged, for another number of specialists, or holds an id that is no token.
    """
    found = {key: arguments[key] for key in (LENGTHS, IDS) if key in arguments} if arguments else {}
    if not found:
        return None
    if not num_specialists:
        raise RequestError(f"this server does not read own prompts ({', '.join(found)}): start it by {HOW_TO_START}")
    for key in (LENGTHS, IDS):
        if not _are_whole_numbers(found.get(key)):
            raise RequestError(f"vllm_xargs.{key} should be a list of whole numbers, but is {_shortened(found, key)}")
    lengths, ids = found[LENGTHS], found[IDS]
    if len(lengths) != num_specialists:
        raise RequestError(f"{LENGTHS} has {len(lengths)} prompts, but the model has {num_specialists} specialists")
    if min(lengths) < 1:
        raise RequestError(f"{LENGTHS} holds {min(lengths)}: a specialist's prompt has at least one token")
    if sum(lengths) != len(ids):
        raise RequestError(f"{LENGTHS} add up to {sum(lengths)}, but {IDS} holds {len(ids)} ids")
    if wrong := [token for token in ids if not 0 <= token < vocab_size]:
        raise RequestError(f"{IDS} holds {wrong[0]}, but the model's ids are 0 to {vocab_size - 1}")
    return tuple(tuple(ids[start:stop]) for start, stop in pairwise(accumulate(lengths, initial=0)))


def check_length(prompts: Prompts, prompt_length: int) -> None:
    """Compare with the prompt that the engine counts by.

    Raises:
        RequestError: It has not as many tokens as the longest.
    """
    if (longest := max(map(len, prompts))) != prompt_length:
        raise RequestError(
            f"the request's prompt has {prompt_length} tokens, but the longest of {IDS} has {longest}: send that one "
            "as the prompt"
        )


def _are_whole_numbers(values: Any) -> bool:
    return isinstance(values, list | tuple) and bool(values) and all(type(value) is int for value in values)


def _shortened(found: Mapping[str, Any], key: str) -> str:
    text = repr(found[key]) if key in found else "missing"
    return text if len(text) <= 60 else f"{text[:57]}..."
