"""Memory: what each specialist and each phase of a recipe needs, against what the machine has.

Counted are weights, gradients, AdamW's two moments and the KV cache: what is certain. Activations and the logits of a
micro-batch come on top: `ultrafuser train RECIPE --dry-run` works them out from the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ultrafuser.config.recipe import Recipe
from ultrafuser.doctor.architecture import context_length
from ultrafuser.doctor.facts import Facts
from ultrafuser.doctor.finding import Finding, blocker, ok, warning
from ultrafuser.doctor.machine import Machine
from ultrafuser.model.gate import count_gate_parameters
from ultrafuser.model.memory import ITEM_BYTES, gib

TRAINED_COPIES = 4  # weights, gradients, and the two moments of AdamW, all in the dtype of the weights
SAVED_COPIES = 3  # a checkpoint holds weights and moments
GATE_BYTES = 4  # the gate is fp32 whatever the specialists are
TIGHT = 0.8  # above this part of the machine's memory little is left for activations


@dataclass(frozen=True, slots=True)
class Size:
    """One specialist in numbers."""

    name: str
    model: str
    architecture: str
    num_parameters: int
    weights_bytes: int
    kv_bytes_per_token: int
    num_rows: int
    hidden_size: int
    context: int | None


@dataclass(frozen=True, slots=True)
class Need:
    """What one phase of a recipe takes.

    Attributes:
        phase: "inference", "tune:<name>", "stage1" or "stage2".
        bytes: Weights, gradients, moments and caches.
        made_of: The same in words.
        checkpoint_bytes: One checkpoint of the phase on disk.
    """

    phase: str
    bytes: int
    made_of: str
    checkpoint_bytes: int = 0


def measure(facts: Facts, recipe: Recipe) -> Size | None:
    """Numbers of one specialist, from its configuration alone; None where that is unknown."""
    if facts.config is None or facts.num_parameters is None or facts.num_rows is None:
        return None
    config, width = facts.text_config, ITEM_BYTES[recipe.dtype]
    num_heads = getattr(config, "num_attention_heads", 0) or 0
    kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // max(1, num_heads)
    return Size(
        name=facts.name,
        model=facts.source.model,
        architecture=str(facts.config.model_type),
        num_parameters=facts.num_parameters,
        weights_bytes=facts.num_parameters * width,
        kv_bytes_per_token=2 * config.num_hidden_layers * kv_heads * head_size * width,
        num_rows=facts.num_rows,
        hidden_size=int(config.hidden_size),
        context=context_length(facts),
    )


def plan(sizes: Sequence[Size], recipe: Recipe) -> list[Need]:
    """What every phase of a recipe needs; the sizes of all specialists must be known."""
    weights = sum(size.weights_bytes for size in sizes)
    gate = _gate_parameters(sizes, recipe) * GATE_BYTES
    length = max_length(recipe)
    cache = sum(size.kv_bytes_per_token for size in sizes) * length
    needs = [Need("inference", weights + gate + cache, f"weights, KV cache of one conversation of {length:,} tokens")]
    if recipe.data is None:
        return needs
    for size in sizes:
        if recipe.specialists[size.name].tune is not None:
            whole = size.weights_bytes
            what = "weights, gradients, moments of one specialist"
            needs.append(Need(f"tune:{size.name}", TRAINED_COPIES * whole, what, SAVED_COPIES * whole))
    for phase, stage in (("stage1", recipe.stage1), ("stage2", recipe.stage2)):
        if stage is None or (len(sizes) == 1 and not stage.train_specialists):
            continue
        if stage.train_specialists:
            what = "weights, gradients, moments of everything"
            needs.append(Need(phase, TRAINED_COPIES * (weights + gate), what, SAVED_COPIES * (weights + gate)))
        else:
            what = "frozen weights; gate with gradients and moments"
            needs.append(Need(phase, weights + TRAINED_COPIES * gate, what, SAVED_COPIES * gate))
    return needs


def max_length(recipe: Recipe) -> int:
    """The longest record of a recipe, in tokens; 2,048 where it has no data."""
    return recipe.data.max_length if recipe.data is not None else 2048


def check_memory(needs: Sequence[Need], sizes: Sequence[Size], machine: Machine, recipe: Recipe) -> Iterator[Finding]:
    """Each phase against the memory of the device it would run on."""
    on_gpu = (recipe.train.device or machine.device).startswith("cuda") and machine.gpu_bytes is not None
    have, place = (machine.gpu_bytes or 0, "the GPU") if on_gpu else (machine.ram_bytes, "this machine")
    weights = sum(size.weights_bytes for size in sizes)
    if on_gpu and weights > machine.ram_bytes:
        do = "weights pass through RAM on their way to the GPU: find a machine with more"
        yield blocker("memory", f"the weights take {gib(weights)}, RAM has {gib(machine.ram_bytes)}", do)
    for need in needs:
        what = f"{need.phase} takes {gib(need.bytes)} before activations; {place} has {gib(have)}"
        if need.bytes > have:
            yield blocker("memory", what, _advice(need, recipe))
        elif need.bytes > TIGHT * have:
            yield warning("memory", what, "little is left for activations: lower train.micro_batch_tokens")
        else:
            yield ok("memory", what)


def check_disk(needs: Sequence[Need], sizes: Sequence[Size], free_bytes: int, recipe: Recipe) -> Iterator[Finding]:
    """Checkpoints of every phase (one more than are kept, while it is written), tuned specialists, the fused model."""
    if recipe.data is None:
        return
    num_kept = recipe.train.keep_checkpoints
    tuned = sum(size.weights_bytes for size in sizes if recipe.specialists[size.name].tune is not None)
    checkpoints = num_kept * sum(need.checkpoint_bytes for need in needs)
    extra = max((need.checkpoint_bytes for need in needs), default=0)
    total = checkpoints + extra + tuned + sum(size.weights_bytes for size in sizes)
    what = f"a whole run writes up to {gib(total)} (checkpoints {gib(checkpoints + extra)}); {gib(free_bytes)} are free"
    if total > free_bytes:
        yield warning("disk", what, "lower train.keep_checkpoints, set output to a larger disk, or delete old runs")
    else:
        yield ok("disk", what)


def _gate_parameters(sizes: Sequence[Size], recipe: Recipe) -> int:
    return count_gate_parameters({size.name: size.hidden_size for size in sizes}, recipe.gate)


def _advice(need: Need, recipe: Recipe) -> str:
    narrower = ", or set dtype: bfloat16" if recipe.dtype == "float32" else ""
    if need.phase == "stage2":
        return f"leave stage2 out (stage 1 trains the gate alone), use smaller specialists{narrower}"
    return f"use smaller or fewer specialists, a larger machine{narrower}"
