"""Architecture: can each model be fused, and where specialists differ in ways that matter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ultrafuser.config.recipe import Recipe
from ultrafuser.doctor.facts import Facts
from ultrafuser.doctor.finding import Finding, blocker, ok, warning


def check_model(facts: Facts) -> Iterator[Finding]:
    """A causal LM that transformers knows, with one backbone and one head."""
    if facts.config is None:
        return
    kind = facts.config.model_type
    if type(facts.config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not facts.source.trust_remote_code:
        yield blocker(facts.name, f"{kind!r} is no causal LM that transformers knows", "give a decoder language model")
    elif facts.meta_model is None:
        yield blocker(
            facts.name, f"{kind!r} cannot be built: {facts.reasons.get('model', 'unknown')}", "repair config.json"
        )
    elif facts.meta_model.base_model is facts.meta_model or facts.meta_model.get_output_embeddings() is None:
        yield blocker(facts.name, f"{kind!r} has no single backbone and head, so it cannot be fused", "leave it out")
    if facts.config is not None and getattr(facts.config, "quantization_config", None) is not None:
        yield warning(
            facts.name, "its weights are quantized", "it can be fused and the gate trained, but not tuned itself"
        )


def check_sizes(specialists: Sequence[Facts]) -> Iterator[Finding]:
    """Hidden sizes and architectures may differ; tied heads may be mixed."""
    known = [facts for facts in specialists if facts.meta_model is not None]
    if not known:
        return
    hidden = {facts.name: int(facts.text_config.hidden_size) for facts in known}
    if len(set(hidden.values())) > 1:
        yield ok("gate", f"hidden sizes differ ({_list(hidden)}): the gate gets one input projection per specialist")
    kinds = {facts.name: str(facts.config.model_type) for facts in known}
    if len(set(kinds.values())) > 1:
        yield ok(
            "architecture", f"architectures differ ({_list(kinds)}): they fuse, but their weights cannot be averaged"
        )
    tied = {facts.name: "tied" if _is_tied(facts) else "own" for facts in known}
    what = "all tied to the embedding" if set(tied.values()) == {"tied"} else "none is tied"
    yield ok("heads", what if len(set(tied.values())) == 1 else f"mixed: {_list(tied)}; each keeps its own way")


def check_positions(specialists: Sequence[Facts], recipe: Recipe) -> Iterator[Finding]:
    """Context lengths against the recipe's, and rotary settings against each other."""
    known = [facts for facts in specialists if facts.config is not None]
    max_length = recipe.data.max_length if recipe.data is not None else 0
    limits = {facts.name: limit for facts in known if (limit := context_length(facts)) is not None}
    for facts in known:
        limit = limits.get(facts.name)
        if limit is not None and max_length > limit:
            finding = warning if _rope(facts) is not None else blocker
            what = f"it knows positions up to {limit:,}, but data.max_length is {max_length:,}"
            yield finding(facts.name, what, f"set data.max_length to {limit} or less")
    if len(set(limits.values())) > 1:
        yield warning(
            "context",
            f"context lengths differ: {_list({name: f'{limit:,}' for name, limit in limits.items()})}",
            f"the fused model is sound up to the shortest, {min(limits.values()):,} tokens",
        )
    elif limits:
        records = f"; records have at most {max_length:,}" if max_length else ""
        yield ok("context", f"{min(limits.values()):,} tokens for all{records}")
    ropes = {facts.name: rope for facts in known if (rope := _rope(facts)) is not None}
    if len(set(ropes.values())) > 1:
        yield warning(
            "rope",
            f"rotary embeddings differ: {_list(ropes)}",
            "each specialist keeps its own, so fusing is right; do not average such weights",
        )
    elif len(ropes) > 1:
        yield ok("rope", f"the same for all: {next(iter(ropes.values()))}")


def check_dtype(specialists: Sequence[Facts], recipe: Recipe) -> Iterator[Finding]:
    """What the weights were saved in against what the recipe holds them in."""
    saved = {
        facts.name: str(dtype).removeprefix("torch.") for facts in specialists if (dtype := _dtype(facts)) is not None
    }
    if saved:
        values = set(saved.values())
        text = next(iter(values)) if len(values) == 1 else _list(saved)
        narrower = recipe.dtype != "float32" and values != {recipe.dtype}
        yield ok("dtype", f"saved as {text}, held as {recipe.dtype}" + (", which rounds them" if narrower else ""))
    stages = [stage for stage in (recipe.stage1, recipe.stage2) if stage is not None and stage.train_specialists]
    tunes = [source.tune for source in recipe.specialists.values() if source.tune is not None]
    if recipe.dtype != "float32" and recipe.data is not None and (stages or tunes):
        yield warning(
            "dtype",
            f"specialists are trained in {recipe.dtype}: AdamW's small steps are lost to rounding",
            "set dtype: float32 and train.precision: bf16 (fp32 master weights, bf16 arithmetic) where memory allows",
        )


def context_length(facts: Facts) -> int | None:
    """Positions a model was made for, if its configuration says."""
    limit = getattr(facts.text_config, "max_position_embeddings", None) if facts.config is not None else None
    return int(limit) if isinstance(limit, int) and limit > 0 else None


def _rope(facts: Facts) -> str | None:
    parameters = getattr(facts.text_config, "rope_parameters", None)
    if not isinstance(parameters, dict) or not parameters:
        return None
    rest = {key: value for key, value in parameters.items() if key not in ("rope_theta", "rope_type", "type")}
    kind = parameters.get("rope_type", "default")
    extra = f" {kind}" if kind != "default" else ""
    extra += f" ({_list(rest)})" if rest else ""
    return f"theta {_number(parameters.get('rope_theta'))}{extra}"


def _number(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)


def _is_tied(facts: Facts) -> bool:
    return bool(getattr(facts.text_config, "tie_word_embeddings", False))


def _dtype(facts: Facts) -> Any:
    return getattr(facts.config, "dtype", None) or getattr(facts.text_config, "dtype", None) if facts.config else None


def _list(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
