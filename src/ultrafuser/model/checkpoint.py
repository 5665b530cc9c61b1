"""Saving and loading a fused model: whole, or the gate alone with references to its specialists.

A gate-only folder holds a few MB: the gate, and for each specialist where it came from, at which revision, and the
hash of its weights, which is checked at load; adapters lie in the folder (`adapter_files`). All kinds reload with
`AutoModelForCausalLM.from_pretrained`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedModel

from ultrafuser.config.recipe import SpecialistConfig
from ultrafuser.errors import ModelError
from ultrafuser.files import put_in_place
from ultrafuser.model.adapter_files import (
    absolute,
    has_adapters,
    locate,
    read_adapters,
    write_adapters,
    write_frozen,
)
from ultrafuser.model.build import assemble, build_fused, read_templates
from ultrafuser.model.configuration import FusedConfig
from ultrafuser.model.lean import is_lean
from ultrafuser.model.lora import add_adapter, frozen_state
from ultrafuser.model.model_card import write_model_card
from ultrafuser.model.shared_base import check_adapters, share_base
from ultrafuser.model.specialist import first_line, load_specialist, load_tokenizer, state_digest, tensors_digest
from ultrafuser.model.target import check_model_target
from ultrafuser.model.vocabulary import trim_vocabulary

if TYPE_CHECKING:
    from ultrafuser.model.fused import FusedForCausalLM

GATE_FILE = "gate.safetensors"
GENERATION_FILE = "generation_config.json"


def save_fused(
    model: FusedForCausalLM,
    folder: Path | str,
    *,
    tokenizer: Any = None,
    gate_only: bool = False,
    recipe: str | None = None,
    results: Mapping[str, Any] | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a model folder, whole or not at all.

    Args:
        model: What to save.
        folder: Replaced if it is a fused model.
        tokenizer: Saved beside the weights, with the first template as its chat template where it has none.
        gate_only: Leave the specialists out and refer to them; each must have come from a folder or the hub and be as
            it was there, which is checked by reading it once more.
        recipe: The resolved recipe as YAML, for the model card and `recipe.yaml`.
        results: Scores for the model card: model -> domain -> {"loss": ...}.
        max_shard_size: Of the safetensors files.

    Raises:
        ModelError: `gate_only` with a specialist that came from no folder or was trained since; a folder that holds
            something else, which would be lost; or a disk that refuses.
    """
    folder = Path(folder)
    check_model_target(folder)
    if not gate_only and any(is_lean(specialist) for specialist in model.specialists.values()):
        raise ModelError("only the gate and the heads of this model are in memory: save it with gate_only=True")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        if gate_only:
            _write_gate(model, partial)
        else:
            model.save_pretrained(partial, max_shard_size=max_shard_size)  # with adapters: `write_adapted`
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if recipe is not None:
            (partial / "recipe.yaml").write_text(recipe, encoding="utf-8")
        write_model_card(partial / "README.md", model.config, recipe=recipe, results=results)
        put_in_place(partial, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"cannot write the model to {folder}: {reason}; nothing was replaced") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def write_adapted(model: FusedForCausalLM, folder: Path | str, **options: Any) -> None:
    """Write gate, adapters and, once, the frozen weights: what `save_pretrained` means where there are adapters."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sources = write_frozen(model, folder, **options)
    for part in sources:
        specialist = model.specialists[part["name"]]
        part |= {"dtype": str(_frozen_dtype(specialist)).removeprefix("torch."), "digest": frozen_digest(specialist)}
    _write_gate_files(model, folder, sources)


def load_fused(
    cls: type[FusedForCausalLM],
    from_pretrained: Callable[..., Any],
    folder: Any,
    *args: Any,
    without: Sequence[str] = (),
    add: Mapping[str, Any] | None = None,
    add_templates: Mapping[str, Any] | None = None,
    check_digests: bool = True,
    **kwargs: Any,
) -> Any:
    """Load a saved fusion, leaving specialists out or adding new ones: the gate scores each alone, so n may change.

    Args:
        cls: `FusedForCausalLM` or a subclass.
        from_pretrained: The loader of transformers, for weights that are all in the folder.
        folder: Folder or hub id.
        without: Names to leave out; their weights are not read.
        add: Specialists to add at the end, as in `from_specialists`.
        add_templates: Template of each added specialist.
        check_digests: Compare the weights that a gate-only folder refers to with the recorded hashes.

    Raises:
        ModelError: An unknown name, none left, a changed specialist, or a missing file.
    """
    config = kwargs.pop("config", None)
    if not isinstance(config, FusedConfig):
        places = ("revision", "cache_dir", "local_files_only", "token")
        location: dict[str, Any] = {key: kwargs[key] for key in places if key in kwargs}
        config = _read_config(folder, location)
    if unknown := set(without) - set(config.names):
        raise ModelError(f"cannot leave out {', '.join(sorted(unknown))}: the model has {', '.join(config.names)}")
    kept = [name for name in config.names if name not in without]
    if not kept:
        raise ModelError("cannot leave out every specialist")
    config = _restrict(config, kept) if without else config
    if config.gate_only:
        model = _load_gate_only(cls, Path(str(folder)), config, check_digests, **kwargs)
    else:
        model = _load_whole(from_pretrained, folder, *args, config=config, **kwargs)
    if not add:
        return model
    try:
        tokenizer = load_tokenizer(SpecialistConfig(model=str(folder)))
    except ModelError:
        tokenizer = None
    return _add_specialists(cls, model, add, add_templates, tokenizer)


def _load_whole(from_pretrained: Callable[..., Any], folder: Any, *args: Any, **kwargs: Any) -> Any:
    """The loader of transformers, but a weight that is not in the folder is an error and not a random number."""
    wants_info = kwargs.pop("output_loading_info", False)
    model, info = from_pretrained(folder, *args, output_loading_info=True, **kwargs)
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{folder} lacks the weight {missing[0]!r}{more}: the folder is incomplete, fetch it again")
    return (model, info) if wants_info else model


def _read_config(folder: Any, location: Mapping[str, Any]) -> FusedConfig:
    try:
        values, _ = FusedConfig.get_config_dict(folder, **location)
    except OSError as error:
        raise ModelError(f"no fused model could be loaded from {folder}: {first_line(error)}") from error
    if (kind := values.get("model_type")) != FusedConfig.model_type:
        raise ModelError(f"{folder} holds a {kind} model and no fused one: make one with from_specialists")
    config: FusedConfig = FusedConfig.from_pretrained(folder, **location)
    return config


def _load_gate_only(
    cls: type[FusedForCausalLM],
    folder: Path,
    config: FusedConfig,
    check_digests: bool,
    *,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
    **_: Any,
) -> Any:
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not folder.is_dir() and any(part.get("lora") for part in config.sources):
        folder = Path(snapshot_download(str(folder)))
    config.sources = [locate(part, folder) for part in config.sources]
    adapters = read_adapters(folder, config.sources, check=check_digests)
    models: dict[str, PreTrainedModel] = {}
    for part in config.sources:
        if (adapter := adapters[part["name"]]) is not None:
            check_adapters(_as_source(part, trust_remote_code), {part["name"]: adapter})
    for part in config.sources[: 1 if config.shared_base else None]:
        recorded = _load_part(part, config, trust_remote_code)
        if check_digests and (actual := state_digest(recorded)) != part["digest"]:
            raise ModelError(
                f"specialist {part['name']!r} from {part['model']} is not the one this gate was trained with (weights "
                f"{actual[:12]}, expected {str(part['digest'])[:12]}): restore it, or pass check_digests=False"
            )
        # Read again for another type, since casting would round what the loader keeps exact (RoPE's frequencies).
        again = wanted not in (None, recorded.dtype)
        models[part["name"]] = _load_part(part, config, trust_remote_code, wanted) if again else recorded
    if config.shared_base:
        models = share_base(next(iter(models.values())), adapters, dtype=wanted)
    else:
        for name, adapter in adapters.items():
            if adapter is not None:
                add_adapter(models[name].requires_grad_(False), adapter, name=name, dtype=wanted)
    config.gate_only = False  # from here on the model is whole
    model = assemble(cls, config, models, seed=0)
    state = load_file(_find_file(folder, config, GATE_FILE))
    left_out = {key for key in state if key.startswith("projections.") and key.split(".")[1] not in config.names}
    model.fusion_gate.load_state_dict({key: value for key, value in state.items() if key not in left_out})
    model.generation_config = GenerationConfig.from_pretrained(_find_file(folder, config, GENERATION_FILE).parent)
    return model


def _load_part(
    part: Mapping[str, Any], config: FusedConfig, trust_remote_code: bool = False, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A specialist as it was when its digest was taken: with the rows that all share and, unless told, in that type."""
    source = _as_source(part, trust_remote_code)
    model = load_specialist(source, name=part["name"], dtype=dtype or getattr(torch, part["dtype"]))
    trim_vocabulary({part["name"]: model}, size=config.vocab_size)
    return model


def _as_source(part: Mapping[str, Any], trust_remote_code: bool = False) -> SpecialistConfig:
    places = {key: part[key] for key in ("model", "revision", "gguf_file", "adapter")}
    return SpecialistConfig(**places, trust_remote_code=trust_remote_code)


def _find_file(folder: Path, config: FusedConfig, name: str) -> Path:
    if (folder / name).is_file():
        return folder / name
    if folder.is_dir():
        raise ModelError(f"{folder} should hold a gate, but {name} is missing: the folder is incomplete")
    from transformers.utils.hub import cached_file

    return Path(str(cached_file(config.name_or_path or str(folder), name)))


def _add_specialists(
    cls: type[FusedForCausalLM],
    model: Any,
    add: Mapping[str, Any],
    templates: Mapping[str, Any] | None,
    tokenizer: Any,
) -> Any:
    if taken := set(add) & set(model.names):
        raise ModelError(f"cannot add {', '.join(sorted(taken))}: the model has a specialist of that name")
    old = dict(zip(model.names, read_templates(model.config), strict=True)) if model.config.templates else {}
    grown = build_fused(
        cls,
        {**dict(model.specialists.items()), **add},
        templates={**old, **(templates or dict.fromkeys(add, "tokenizer"))} if old else None,
        tokenizer=tokenizer,
        **_options(model.config),
    )
    state = model.fusion_gate.state_dict()
    expected = {key for key in grown.fusion_gate.state_dict() if not key.startswith("projections.")}
    if any(grown.fusion_gate.state_dict()[key].shape != state[key].shape for key in expected) or (
        bool(model.fusion_gate.projections) != bool(grown.fusion_gate.projections)
    ):
        raise ModelError(
            "the added specialist has another hidden size, which changes the shape of the gate: make a new fusion with "
            "from_specialists and train its gate"
        )
    grown.fusion_gate.load_state_dict(state, strict=False)
    grown.config.sources[: len(model.names)] = model.config.sources
    grown.config.end_token = model.config.end_token or grown.config.end_token
    if tokenizer is None:  # then the stop tokens of the old templates could not be looked up
        grown.generation_config = model.generation_config
    return grown


def _write_gate(model: FusedForCausalLM, folder: Path) -> None:
    sources = [
        _describe_source(model, part) for part in model.config.sources[: 1 if model.config.shared_base else None]
    ]
    if model.config.shared_base:  # what is known of the base's weights is known of all
        sources = [{**sources[0], "name": part["name"]} for part in model.config.sources]
    _write_gate_files(model, folder, sources)


def _write_gate_files(model: FusedForCausalLM, folder: Path, sources: list[dict[str, Any]]) -> None:
    sources = write_adapters(model, folder, sources) if has_adapters(model) else sources
    config = FusedConfig.from_dict({**model.config.to_dict(), "gate_only": True, "sources": sources})
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    state = {key: value.contiguous() for key, value in model.fusion_gate.state_dict().items()}
    save_file(state, folder / GATE_FILE, metadata={"format": "pt"})


def _describe_source(model: FusedForCausalLM, part: Mapping[str, Any]) -> dict[str, Any]:
    name, specialist = part["name"], model.specialists[part["name"]]
    if not part["model"]:
        raise ModelError(
            f"specialist {name!r} came from no folder or hub id, so a gate cannot refer to it: save the whole model, "
            "or save the specialist first and build from its folder"
        )
    places = {key: absolute(part[key]) if part[key] else None for key in ("model", "adapter")}
    if is_lean(specialist):  # not in memory, so it cannot have been trained; its digest was taken when it was read
        return {**part, **places}
    described = {
        **part,
        **places,
        "dtype": str(_frozen_dtype(specialist)).removeprefix("torch."),
        "digest": frozen_digest(specialist),
    }
    if state_digest(_load_part(described, model.config)) != described["digest"]:
        raise ModelError(
            f"specialist {name!r} is no longer what {places['model']} holds (trained since?), so a gate cannot refer "
            "to it: save the whole model"
        )
    return described


def frozen_digest(specialist: PreTrainedModel) -> str:
    """Content hash of a specialist's weights but its adapter's."""
    return tensors_digest(frozen_state(specialist))


def _frozen_dtype(specialist: PreTrainedModel) -> torch.dtype:
    return next(value.dtype for value in frozen_state(specialist).values() if value.is_floating_point())


def _options(config: FusedConfig) -> dict[str, Any]:
    names = (
        "gate_hidden_size",
        "gate_num_layers",
        "granularity",
        "fusion_space",
        "weighting",
        "perplexity_temperature",
        "solo",
    )
    return {name: getattr(config, name) for name in names}


def _restrict(config: FusedConfig, kept: Sequence[str]) -> FusedConfig:
    """The configuration of some of the specialists."""
    values = config.to_dict()
    for key in ("specialists", "sources"):
        values[key] = [part for part in values[key] if part["name"] in kept]
    if config.templates:
        values["templates"] = [t for name, t in zip(config.names, config.templates, strict=True) if name in kept]
    if values["solo"] not in kept:
        values["solo"] = None
    restricted: FusedConfig = FusedConfig.from_dict(json.loads(json.dumps(values)))
    if len(set(config.hidden_sizes)) > 1 and len(set(restricted.hidden_sizes)) == 1:
        raise ModelError(
            "the specialists that are left have one hidden size, but the gate was trained with a projection for each: "
            "keep one of another size, or train a new gate"
        )
    return restricted
