"""Whether a checkpoint can be served by vLLM, told from its configuration and the headers of its files.

Everything here runs before vLLM loads anything, needs no vLLM, and ends in one line that says what to do.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from ultrafuser.errors import ConfigError, ModelError, VocabularyError
from ultrafuser.model.configuration import FusedConfig
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.vllm_plugin.weights import GATE, SPECIALISTS, is_per_token, needs_gate, running_names

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
GATE_FILE = "gate.safetensors"
EXPORT = "ultrafuser export MODEL --for vllm"


def check_options(config: FusedConfig, *, gate_only: bool | None = None) -> None:
    """Refuse what one forward over a mixed batch of requests cannot do.

    Args:
        config: The model's.
        gate_only: Whether the folder refers to its specialists; None: as the configuration says.

    Raises:
        ConfigError: An option of the fusion, or a source of a specialist, that vLLM cannot follow.
    """
    if config.weighting == "perplexity" or (config.granularity == "prompt" and needs_gate(config)):
        what = "weighting: perplexity" if config.weighting == "perplexity" else "granularity: prompt"
        raise ConfigError(f"{what} holds weights from the prompt, which vLLM cannot: serve it with `ultrafuser serve`")
    if config.shared_base or any(source.get("lora") for source in config.sources):
        raise ConfigError(
            "the specialists have adapters, which vLLM cannot load in a fusion: write whole models first, with "
            "`ultrafuser merge-adapters MODEL --out FOLDER`"
        )
    several = len(running_names(config)) > 1
    if config.fusion_space == "probs" and several:
        raise ConfigError("fusion space probs is not linear in the logits: serve this model with `ultrafuser serve`")
    for name in running_names(config):
        part = config.specialist_configs[name].get_text_config()
        if getattr(part, "final_logit_softcapping", None) and several:
            raise ConfigError(f"specialist {name!r} caps its logits, which vLLM cannot fuse: use `ultrafuser serve`")
    for source in config.sources if (config.gate_only if gate_only is None else gate_only) else ():
        if source["name"] in running_names(config) and (source["adapter"] or source["gguf_file"]):
            kind = "an adapter" if source["adapter"] else "a GGUF file"
            raise ConfigError(
                f"specialist {source['name']!r} comes from {kind}, which vLLM cannot load in a fusion: make the model "
                f"whole with {EXPORT}"
            )


def check_folder(folder: Path, config: FusedConfig) -> None:
    """Look through the files of a model folder, and of the folders that a gate-only one refers to.

    Raises:
        ModelError: A shard, a specialist or the gate is missing, or a specialist is not the recorded one.
        VocabularyError: A weight has another number of rows than the shared vocabulary.
    """
    if not config.gate_only:
        shapes = read_shapes(folder)
        for owner in [*(f"{SPECIALISTS}.{name}" for name in running_names(config)), *[GATE] * needs_gate(config)]:
            if not any(name.startswith(f"{owner}.") for name in shapes):
                raise ModelError(f"{folder} holds no weights of {owner}: it is incomplete, save the model again")
        for name, shape in shapes.items():
            if name.split(".")[1] in running_names(config):
                _check_rows(name, shape, config, folder)
        _check_complete(set(shapes), config, folder)
        return
    if needs_gate(config) and not (folder / GATE_FILE).is_file():
        raise ModelError(f"{folder} should hold a gate, but {GATE_FILE} is missing: the folder is incomplete")
    for source in config.sources:
        place = Path(str(source["model"]))
        if source["name"] not in running_names(config) or not (place.exists() or place.is_absolute()):
            continue
        shapes = read_shapes(place)
        for name, shape in shapes.items():
            _check_rows(f"{source['name']}.{name}", shape, config, place, surplus=True)
        _check_digest(place, source, config)


def check_vocabulary(place: str, config: FusedConfig) -> None:
    """Compare tokenizers with the shared vocabulary, and with each other where specialists lie in their own folders.

    Raises:
        VocabularyError: A token without a row, or one that differs.
    """
    tokenizer = AutoTokenizer.from_pretrained(place)
    highest, token = max(((index, token) for token, index in tokenizer.get_vocab().items()), default=(-1, ""))
    if highest >= config.vocab_size:
        raise VocabularyError(
            f"the tokenizer of {place} has the token {token!r} at {highest}, but the model has {config.vocab_size} "
            "rows: take the tokenizer that the model was made with"
        )
    own = {index: token for token, index in tokenizer.get_vocab().items()}
    for source in config.sources if config.gate_only else ():
        folder = Path(str(source["model"]))
        if not (folder / "tokenizer_config.json").is_file():
            continue
        others = {index: token for token, index in AutoTokenizer.from_pretrained(folder).get_vocab().items()}
        for index in range(config.vocab_size):
            if others.get(index) != own.get(index):
                raise VocabularyError(
                    f"token {index} is {own.get(index)!r} in {place} but {others.get(index)!r} for specialist "
                    f"{source['name']!r}: fusing adds logits token by token, so all must share one vocabulary"
                )


def longest_context(config: FusedConfig) -> int:
    """Tokens that every specialist that runs can read."""
    parts = [config.specialist_configs[name].get_text_config() for name in running_names(config)]
    return min(int(getattr(part, "max_position_embeddings", None) or 1 << 30) for part in parts)


def template_names(config: FusedConfig) -> list[str]:
    """Names of the templates that differ, of the specialists that run; one name or none is a shared template."""
    mine = [t for name, t in zip(config.names, config.templates, strict=False) if name in running_names(config)]
    return list({template["source"]: str(template["name"]) for template in mine}.values())


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights of a folder, from the headers of its safetensors files.

    Raises:
        ModelError: No such files, one that the index names is missing, or one is damaged.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} cannot be read ({error}): it is damaged, fetch it again") from error
    return shapes


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, those of its index where it has one.

    Raises:
        ModelError: There are none, or one that the index names is missing.
    """
    index = folder / INDEX
    if not index.is_file():
        if not (folder / WHOLE).is_file():
            raise ModelError(f"{folder} holds no {WHOLE} and no {INDEX}: give a folder with weights in safetensors")
        return [folder / WHOLE]
    try:
        names: Mapping[str, str] = json.loads(index.read_bytes())["weight_map"]
        files = sorted({folder / file for file in names.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is no index of weights ({type(error).__name__}): fetch it again") from error
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(
            f"{folder} lacks {missing[0]}, one of the {len(files)} files that its index names: fetch it again"
        )
    return files


def files_digest(folder: Path, *, dtype: torch.dtype, vocab_size: int, tied: bool) -> str:
    """`state_digest` of the model that a folder holds, computed from the files one weight at a time.

    Args:
        folder: With safetensors.
        dtype: That the weights had in memory when the digest was taken.
        vocab_size: Rows kept of what has a row per token.
        tied: The head is the embeddings, which the files then hold once and the digest twice.
    """
    homes: dict[str, Path] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            homes |= dict.fromkeys(opened.keys(), file)
    sources = {name: name for name in homes}
    if tied and "lm_head.weight" not in homes:
        sources["lm_head.weight"] = next(name for name in homes if is_per_token(name))
    digest = hashlib.sha256()
    for name, source in sorted(sources.items()):
        with safe_open(homes[source], framework="pt") as opened:
            tensor: Any = opened.get_tensor(source)
        if is_per_token(source):
            tensor = tensor[:vocab_size]
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        flat = tensor.contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


def _check_complete(names: set[str], config: FusedConfig, folder: Path) -> None:
    """Compare with the weights of the model; where an architecture keeps them under other names, vLLM's loader must."""
    with torch.device("meta"):
        model: Any = FusedForCausalLM(config)
    expected = set(model.state_dict())
    missing = sorted(
        name
        for name in expected - names - set(model.all_tied_weights_keys)
        if (needs_gate(config) if name.startswith(f"{GATE}.") else name.split(".")[1] in running_names(config))
    )
    if missing and names <= expected:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{folder} lacks the weight {missing[0]!r}{more}: it is incomplete, fetch it again")


def _check_digest(folder: Path, source: Mapping[str, Any], config: FusedConfig) -> None:
    part = config.specialist_configs[source["name"]]
    tied = bool(part.get_text_config().tie_word_embeddings)
    with torch.device("meta"):
        expected = set(AutoModelForCausalLM.from_config(part).state_dict())
    if expected - {"lm_head.weight"} != set(read_shapes(folder)) - {"lm_head.weight"}:
        logger.warning("specialist %r keeps its weights under other names: its hash is not compared", source["name"])
        return
    actual = files_digest(folder, dtype=getattr(torch, source["dtype"]), vocab_size=config.vocab_size, tied=tied)
    if actual != source["digest"]:
        raise ModelError(
            f"specialist {source['name']!r} in {folder} is not the one this gate was trained with (weights "
            f"{actual[:12]}, expected {str(source['digest'])[:12]}): restore it, or make the model whole with {EXPORT}"
        )


def _check_rows(name: str, shape: tuple[int, ...], config: FusedConfig, folder: Path, *, surplus: bool = False) -> None:
    """Rows beyond the shared ones are allowed where a specialist lies as it came."""
    rows = config.vocab_size
    if is_per_token(name) and (shape[0] < rows or (shape[0] > rows and not surplus)):
        raise VocabularyError(
            f"{name} in {folder} has {shape[0]} rows, but the specialists share {rows} tokens: config.json and weights "
            "are not of one model, save it again"
        )
