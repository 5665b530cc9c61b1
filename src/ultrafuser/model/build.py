"""Make a new fused model from specialists: load, check, align vocabularies, add an untrained gate."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from ultrafuser.chat.library import load_template
from ultrafuser.chat.template import Template
from ultrafuser.config.recipe import Recipe, SpecialistConfig
from ultrafuser.errors import ConfigError, ModelError
from ultrafuser.model.backbone import check_backbone
from ultrafuser.model.configuration import FusedConfig, check_name
from ultrafuser.model.shared_base import check_shared, find_base, load_shared
from ultrafuser.model.specialist import load_specialist, load_tokenizer, parse_source
from ultrafuser.model.vocabulary import check_special_tokens, check_vocabularies, trim_vocabulary

if TYPE_CHECKING:
    from ultrafuser.model.fused import FusedForCausalLM

logger = logging.getLogger(__name__)

TemplateSpecs = Mapping[str, str | Template] | Sequence[str | Template] | str | None


def build_fused(
    cls: type[FusedForCausalLM],
    specialists: Mapping[str, PreTrainedModel | str | Path | SpecialistConfig],
    *,
    templates: TemplateSpecs = None,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    **options: Any,
) -> Any:
    """Fuse models at hand, folders, hub ids, GGUF files or adapters; order is kept.

    Args:
        cls: `FusedForCausalLM` or a subclass.
        specialists: Model or where to find it, by name.
        templates: Template of each specialist: a name of the library, a `.jinja` file, "tokenizer", or a `Template`;
            one for all, one each in order, or by name. None: ordinary `input_ids` alone.
        tokenizer: The shared tokenizer; None: the first that lies beside a specialist's weights.
        dtype: Of weights loaded here; None: fp32. Models at hand keep theirs.
        seed: Of the gate's initial weights.
        options: Fields of `FusedConfig`: gate_hidden_size, granularity, fusion_space, weighting, ...

    Raises:
        ConfigError: No specialists, or names or options that cannot be used.
        ModelError: A specialist cannot be loaded or fused.
        VocabularyError: A token differs between specialists, or one that the tokenizer always writes has no row.
    """
    if not specialists:
        raise ConfigError("a fused model needs at least one specialist")
    sources = {
        name: None if isinstance(source, PreTrainedModel) else _as_source(source)
        for name, source in specialists.items()
    }
    models: dict[str, PreTrainedModel] = {}
    tokenizers: dict[str, Any] = {}
    for name in specialists:
        check_name(name)
    if options.get("shared_base"):
        models = _shared_models(specialists, sources, dtype)
    for name, given in specialists.items():
        source = sources[name]
        if name not in models:
            models[name] = given if source is None else load_specialist(source, name=name, dtype=dtype)  # type: ignore[assignment]
        check_backbone(models[name], name)
        if source is not None:
            try:
                tokenizers[name] = load_tokenizer(source, name=name)
            except ModelError:
                if tokenizer is None and len(specialists) > 1:
                    logger.warning("specialist %r has no tokenizer of its own: its vocabulary is taken on trust", name)
    reference = {"tokenizer": tokenizer} if tokenizer is not None else {}
    rows = min(int(model.get_output_embeddings().weight.shape[0]) for model in models.values())
    if reference or tokenizers:
        check_vocabularies({**reference, **tokenizers}, size=rows)
    trim_vocabulary(models)
    if options.get("shared_base"):
        sources = _shared_places(sources)
    return fuse_models(
        cls, models, sources, tokenizers, templates=templates, tokenizer=tokenizer, rows=rows, seed=seed, **options
    )


def fuse_models(
    cls: type[FusedForCausalLM],
    models: Mapping[str, PreTrainedModel],
    sources: Mapping[str, SpecialistConfig | None],
    tokenizers: Mapping[str, Any],
    *,
    templates: TemplateSpecs,
    tokenizer: Any,
    rows: int,
    seed: int,
    **options: Any,
) -> Any:
    """Fuse models that are loaded, checked and cut to the `rows` of the vocabulary that all have."""
    tokenizer = tokenizer if tokenizer is not None else next(iter(tokenizers.values()), None)
    check_special_tokens(tokenizer, size=rows)
    chosen = resolve_templates(templates, list(models), tokenizer, tokenizers)
    config = FusedConfig(
        specialists=[{"name": name, "config": model.config} for name, model in models.items()],
        templates=[template_fields(template) for template in chosen],
        end_token=tokenizer.eos_token if tokenizer is not None else None,
        sources=[_source_fields(name, source) for name, source in sources.items()],
        vocab_size=rows,
        dtype=next(iter(models.values())).dtype,
        **options,
    )
    fused = assemble(cls, config, models, seed)
    fused.generation_config = _generation_config(fused, chosen, tokenizer)
    return fused


def build_from_recipe(cls: type[FusedForCausalLM], recipe: Recipe, *, tokenizer: Any = None) -> Any:
    """Fuse a recipe's specialists as they are on disk."""
    if tokenizer is None and recipe.tokenizer is not None:
        tokenizer = load_tokenizer(SpecialistConfig(model=recipe.tokenizer))
    return build_fused(
        cls,
        recipe.specialists,
        templates={name: specialist.template for name, specialist in recipe.specialists.items()},
        tokenizer=tokenizer,
        dtype=getattr(torch, recipe.dtype),
        seed=recipe.seed,
        **recipe_options(recipe),
    )


def recipe_options(recipe: Recipe) -> dict[str, Any]:
    """The fields of `FusedConfig` that a recipe decides."""
    return {
        "gate_hidden_size": recipe.gate.hidden_size,
        "gate_num_layers": recipe.gate.num_layers,
        "granularity": recipe.gate.granularity,
        "fusion_space": recipe.fusion.space,
        "weighting": recipe.fusion.weighting,
        "perplexity_temperature": recipe.fusion.perplexity_temperature,
        "shared_base": recipe.shared_base,
    }


def resolve_templates(
    templates: TemplateSpecs, names: Sequence[str], tokenizer: Any, tokenizers: Mapping[str, Any] | None = None
) -> list[Template]:
    """One `Template` per specialist, in order; empty when none are wanted.

    Raises:
        ConfigError: Not one for each specialist.
        TemplateError: Unknown name, or "tokenizer" for a tokenizer without a chat template.
    """
    if templates is None:
        return []
    if isinstance(templates, str):
        templates = dict.fromkeys(names, templates)
    elif not isinstance(templates, Mapping):
        if len(templates) != len(names):
            raise ConfigError(f"{len(templates)} templates for {len(names)} specialists: give one each, in order")
        templates = dict(zip(names, templates, strict=True))
    if unknown := set(templates) ^ set(names):
        raise ConfigError(f"templates and specialists differ in {', '.join(sorted(unknown))}: give one for each")
    chosen = []
    for name in names:
        spec = templates[name]
        own = (tokenizers or {}).get(name, tokenizer)
        if isinstance(spec, str):
            spec = load_template(spec, tokenizer_template=getattr(own, "chat_template", None))
        chosen.append(spec)
    return chosen


def template_fields(template: Template) -> dict[str, Any]:
    """A template as plain values for config.json."""
    return {"name": template.name, "source": template.source, "end_of_turn": list(template.end_of_turn)}


def read_templates(config: FusedConfig) -> list[Template]:
    """The templates that a model was built with."""
    return [Template(t["name"], t["source"], tuple(t["end_of_turn"])) for t in config.templates]


def use_templates(fused: FusedForCausalLM, templates: Sequence[Template], tokenizer: Any) -> None:
    """Write conversations in other templates from here on, and stop where these end a turn.

    Args:
        fused: Changed in place.
        templates: One per specialist, in order.
        tokenizer: The shared one.
    """
    fused.config.templates = [template_fields(template) for template in templates]
    fused.generation_config = _generation_config(fused, templates, tokenizer)


def assemble(
    cls: type[FusedForCausalLM], config: FusedConfig, models: Mapping[str, torch.nn.Module], seed: int
) -> FusedForCausalLM:
    """Build the shell without memory for the specialists, put the models in, and draw the gate from `seed`."""
    with torch.device("meta"):
        fused = cls(config)
    for name, model in models.items():
        fused.specialists[name] = model
    places = (parameter.device for parameter in fused.specialists.parameters() if not parameter.is_meta)
    fused.fusion_gate = new_gate(config, seed).to(next(places, fused.device))
    fused.train(False)
    return fused


def new_gate(config: FusedConfig, seed: int) -> Any:
    """An untrained gate, the same for the same seed, leaving the global random state alone."""
    from ultrafuser.model.gate import Gate

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Gate(
            dict(zip(config.names, config.hidden_sizes, strict=True)),
            hidden_size=config.gate_hidden_size,
            num_layers=config.gate_num_layers,
        ).float()


def _generation_config(fused: FusedForCausalLM, templates: Sequence[Template], tokenizer: Any) -> GenerationConfig:
    """Greedy by default; an answer ends at any specialist's end of turn."""
    ends: list[int] = []
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ends.append(int(tokenizer.eos_token_id))
        for text in (text for template in templates for text in template.end_of_turn):
            index = tokenizer.convert_tokens_to_ids(text)
            if index is not None and index != tokenizer.unk_token_id:
                ends.append(int(index))
    for specialist in fused.specialists.values():
        own = getattr(specialist.generation_config, "eos_token_id", None)
        ends += [own] if isinstance(own, int) else list(own or [])
    ends = [index for index in dict.fromkeys(ends) if index < fused.config.vocab_size]
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None and ends:
        pad = ends[0]
    return GenerationConfig(eos_token_id=ends or None, pad_token_id=pad, do_sample=False)


def _shared_models(
    specialists: Mapping[str, Any], sources: Mapping[str, SpecialistConfig | None], dtype: torch.dtype | None
) -> dict[str, PreTrainedModel]:
    """Specialists of one base, its weights read once; models at hand must share theirs already."""
    places = {name: source for name, source in sources.items() if source is not None}
    if places and len(places) < len(sources):
        raise ConfigError("shared_base: give every specialist as a place on disk, or every one as a model at hand")
    if not places:
        check_shared(specialists)
        return dict(specialists)
    base, models = load_shared(find_base(places), dtype=dtype)
    check_backbone(base, "base")
    return models


def _shared_places(sources: Mapping[str, SpecialistConfig | None]) -> dict[str, SpecialistConfig | None]:
    """Each specialist as its base alone: its adapter is part of the fused model."""
    places = {name: source for name, source in sources.items() if source is not None}
    if not places:
        return dict(sources)
    base = find_base(places).base
    return {name: base.model_copy(update={"template": source.template}) for name, source in places.items()}


def _as_source(given: Any) -> SpecialistConfig:
    return given if isinstance(given, SpecialistConfig) else parse_source(given)


def _source_fields(name: str, source: SpecialistConfig | None) -> dict[str, Any]:
    keys = ("model", "revision", "gguf_file", "adapter", "dtype", "digest")
    fields = {"name": name, **dict.fromkeys(keys)}
    if source is not None:
        fields |= source.model_dump(include={"model", "revision", "gguf_file", "adapter"})
    return fields
