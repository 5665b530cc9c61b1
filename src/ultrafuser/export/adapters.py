"""Full fine-tunes as one base and an adapter each, what that costs, and back: adapters merged into whole models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ultrafuser.chat.messages import Conversation
from ultrafuser.errors import ConfigError, ModelError
from ultrafuser.evaluation.losses import score_losses
from ultrafuser.files import put_in_place
from ultrafuser.model.adapter_files import absolute, has_adapters
from ultrafuser.model.build import assemble
from ultrafuser.model.checkpoint import save_fused
from ultrafuser.model.configuration import FusedConfig, check_name
from ultrafuser.model.extraction import (
    Difference,
    Extract,
    check_family,
    choose_ranks,
    extract_adapter,
    measure_difference,
)
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.generator import FusedGenerator
from ultrafuser.model.load import LoadOptions, load_model
from ultrafuser.model.lora import merge_adapter, write_adapter
from ultrafuser.model.outline import outline, read_config, without_weights
from ultrafuser.model.shared_base import share_base
from ultrafuser.model.specialist import load_specialist, parse_source
from ultrafuser.model.target import check_adapters_target, check_export_target
from ultrafuser.model.vocabulary import trim_vocabulary

FUSED = "fused"


@dataclass(frozen=True, slots=True)
class QualityLoss:
    """Response loss before and after, nats per token, on some conversations of one domain.

    Attributes:
        model: `fused`, or the name of a specialist alone.
        domain: Of the conversations.
        before: Of the full fine-tunes.
        after: Of base and adapters.
    """

    model: str
    domain: str
    before: float
    after: float

    @property
    def change(self) -> float:
        """After over before, less one."""
        return self.after / self.before - 1


def measure_fused(model: FusedForCausalLM, base_place: str, *, max_rank: int = 64) -> dict[str, Difference]:
    """What each specialist of a fused model changed of its base.

    Raises:
        ModelError: One of them is no fine-tune of the base.
    """
    base = _load_base(model, base_place)
    return {
        name: measure_difference(base, model.specialists[name], name=name, max_rank=max_rank) for name in model.names
    }


def extract_fused(
    model: FusedForCausalLM,
    base_place: str,
    *,
    energy: float = 1.0,
    share: float = 0.15,
    max_rank: int = 64,
    differences: Mapping[str, Difference] | None = None,
) -> tuple[FusedForCausalLM, dict[str, Extract]]:
    """The same fusion over a shared base: its gate, its templates, and a low-rank adapter for each specialist.

    Args:
        model: Whose specialists are full fine-tunes of one base.
        base_place: Folder or hub id of the base.
        energy: Part of the differences' energy to keep, 0 to 1, as far as `share` allows.
        share: Parameters of all adapters together over those of the base, at most.
        max_rank: Of any layer.
        differences: As `measure_fused` found them; None: measured here.

    Raises:
        ConfigError: An energy or share that is none.
        ModelError: A specialist is no fine-tune of the base.
    """
    if has_adapters(model):
        raise ModelError("the specialists of this model are adapters already")
    _check_wishes(energy, share)
    source = parse_source(base_place)
    if differences is None:
        differences = measure_fused(model, base_place, max_rank=max_rank)
    base = _load_base(model, base_place)
    extracts = _extract(differences, base, energy=energy, share=share)
    specialists = share_base(base, {name: extract.adapter for name, extract in extracts.items()}, dtype=model.dtype)
    values = model.config.to_dict()
    part = {"model": absolute(source.model), "revision": source.revision, "gguf_file": source.gguf_file}
    unknown = dict.fromkeys(("adapter", "dtype", "digest"))  # the latter are taken when it is saved
    values |= {
        "shared_base": True,
        "specialists": [{"name": name, "config": one.config.to_dict()} for name, one in specialists.items()],
        "sources": [{"name": name, **part, **unknown} for name in model.names],
    }
    shared = assemble(type(model), FusedConfig.from_dict(values), specialists, seed=0)
    shared.fusion_gate.load_state_dict(model.fusion_gate.state_dict())
    shared.generation_config = model.generation_config
    return shared, extracts


def check_fused_family(place: str, base_place: str) -> None:
    """Refuse a fused model whose specialists have other shapes than the base; no weights are read.

    Raises:
        ModelError: Says which specialist and parameter.
    """
    config: Any = read_config(parse_source(place), name=FUSED)
    if not isinstance(config, FusedConfig):
        raise ModelError(f"{place} is no fused model: give fine-tunes as NAME=FOLDER")
    if config.shared_base:
        raise ModelError(f"the specialists of {place} are adapters of one base already")
    tuned = {name: without_weights(part) for name, part in config.specialist_configs.items()}
    check_family(outline(parse_source(base_place), name="base"), tuned)


def extract_specialists(
    base_place: str,
    tuned: Mapping[str, str],
    output: Path,
    *,
    energy: float = 1.0,
    share: float = 0.15,
    max_rank: int = 64,
) -> dict[str, Extract]:
    """Write a peft folder for each of some fine-tunes, `output/<name>`; one fine-tune is in memory at a time.

    Args:
        base_place: Folder or hub id of the base.
        tuned: Folder or hub id of each fine-tune.
        output: Replaced, whole or not at all, if it holds adapters alone.
        energy, share, max_rank: As in `extract_fused`.

    Raises:
        ConfigError: An energy, share or name that is none.
        ModelError: One of them is no fine-tune of the base, the output holds something else, or the disk refuses.
    """
    _check_wishes(energy, share)
    check_adapters_target(output)
    for name in tuned:
        check_name(name)
    source = parse_source(base_place)
    check_family(
        outline(source, name="base"), {name: outline(parse_source(place), name=name) for name, place in tuned.items()}
    )
    base = load_specialist(source, name="base")
    differences = {
        name: measure_difference(base, load_specialist(parse_source(place), name=name), name=name, max_rank=max_rank)
        for name, place in tuned.items()
    }
    extracts = _extract(differences, base, energy=energy, share=share)
    partial = output.with_name(f".{output.name}.partial")
    try:
        for name, specialist in share_base(base, {name: e.adapter for name, e in extracts.items()}).items():
            write_adapter(specialist, partial / name, base=absolute(source.model), revision=source.revision)
        put_in_place(partial, output)
    except OSError as error:
        raise ModelError(f"cannot write adapters to {output}: {error.strerror or error}") from error
    return extracts


def measure_quality(
    before: FusedForCausalLM,
    after: FusedForCausalLM,
    tokenizer: Any,
    conversations: Mapping[str, Sequence[Conversation]],
) -> list[QualityLoss]:
    """Response loss of the fusion, and of each specialist alone, on conversations of each domain."""
    losses = []
    for who in (FUSED, *before.names) if len(before.names) > 1 else (FUSED,):
        for domain, held_out in conversations.items():
            pair = []
            for model in (before, after):
                solo, model.config.solo = model.config.solo, None if who == FUSED else who
                pair.append(score_losses(FusedGenerator(model, tokenizer), held_out).loss.value)
                model.config.solo = solo
            losses.append(QualityLoss(who, domain, *pair))
    return losses


def merge_adapters(model: FusedForCausalLM) -> FusedForCausalLM:
    """A copy whose specialists are whole models again, each with its adapter added to its weights."""
    merged = {name: merge_adapter(model.specialists[name]) for name in model.names}
    values = model.config.to_dict()
    places = dict.fromkeys(("model", "revision", "gguf_file", "adapter", "dtype", "digest"))
    values |= {
        "shared_base": False,
        "specialists": [{"name": name, "config": one.config.to_dict()} for name, one in merged.items()],
        "sources": [{"name": name, **places} for name in model.names],
    }
    plain = assemble(type(model), FusedConfig.from_dict(values), merged, seed=0)
    plain.fusion_gate.load_state_dict(model.fusion_gate.state_dict())
    plain.generation_config = model.generation_config
    return plain


def save_merged(place: str, output: Path) -> Path:
    """Write a model with adapters as whole models.

    Raises:
        ConfigError: The output is the model itself.
        ModelError: It has no adapters, or cannot be read or written.
    """
    check_export_target(output, place)
    model, tokenizer = load_model(place, LoadOptions(device="cpu"))
    if not has_adapters(model):
        raise ModelError(f"{place} has no adapters to merge")
    return save_fused(merge_adapters(model), output, tokenizer=tokenizer)


def _load_base(model: FusedForCausalLM, base_place: str) -> PreTrainedModel:
    base = load_specialist(parse_source(base_place), name="base", dtype=model.dtype)
    check_family(base, {name: model.specialists[name] for name in model.names})
    trim_vocabulary({"base": base}, size=model.config.vocab_size)
    return base


def _check_wishes(energy: float, share: float) -> None:
    if not (0 < energy <= 1 and share > 0):
        raise ConfigError(f"energy {energy} and share {share}: energy is above 0 and at most 1, share above 0")


def _extract(
    differences: Mapping[str, Difference], base: PreTrainedModel, *, energy: float, share: float
) -> dict[str, Extract]:
    room = int(share * sum(parameter.numel() for parameter in base.parameters()))
    ranks = choose_ranks(differences, energy=energy, room=room)
    return {name: extract_adapter(difference, ranks[name]) for name, difference in differences.items()}
