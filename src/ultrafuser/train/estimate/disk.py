"""What a run writes: checkpoints, tuned specialists, the fused model, hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ultrafuser.config.recipe import Recipe
from ultrafuser.config.training import LoraConfig
from ultrafuser.model.lean import SpecialistFacts
from ultrafuser.model.memory import ITEM_BYTES
from ultrafuser.train.estimate.batches import PhasePlan
from ultrafuser.train.estimate.shapes import Shape, gate_parameters
from ultrafuser.train.hidden.plan import GB, bytes_per_token

SAVED_COPIES = 3  # a checkpoint holds trained weights and the two moments of AdamW


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes on disk when a run has ended.

    Attributes:
        checkpoints: By phase, all that are kept.
        writing: One more of the largest, while it is written.
        specialists: Those that the recipe tunes.
        model: The fused model.
        hidden_states: Of stage 1, all of them.
        hidden_limit: The most of these that lie there at once; None: no cache.
    """

    checkpoints: dict[str, int]
    writing: int
    specialists: int
    model: int
    hidden_states: int
    hidden_limit: int | None

    @property
    def num_bytes(self) -> int:
        """The most at once."""
        hidden = min(self.hidden_states, self.hidden_limit) if self.hidden_limit is not None else 0
        return sum(self.checkpoints.values()) + self.writing + self.specialists + self.model + hidden


def measure_disk(recipe: Recipe, shapes: Sequence[Shape], phases: Sequence[PhasePlan]) -> Disk:
    """What a run writes."""
    each = ITEM_BYTES[recipe.dtype]
    tuned = {name: source.tune for name, source in recipe.specialists.items() if source.tune is not None}
    gate = 4 * gate_parameters(shapes, recipe)
    single = {phase.name: SAVED_COPIES * _trained(shapes, phase, gate, each) for phase in phases}
    kept = {
        phase.name: single[phase.name]
        * min(recipe.train.keep_checkpoints, -(-phase.stage.steps // recipe.train.checkpoint_every))
        for phase in phases
    }
    cached = recipe.train.stage1_cache
    stage1 = next((phase for phase in phases if phase.name == "stage1"), None)
    has_cache = cached.mode != "off" and stage1 is not None and len(shapes) > 1
    whole = recipe.stage2 is not None or not has_cache
    return Disk(
        checkpoints=kept,
        writing=max(single.values()),
        specialists=sum(_weights(shape, tuned[shape.name].lora, each) for shape in shapes if shape.name in tuned),
        model=gate + (_model(recipe, shapes, phases, each) if whole else 0),
        hidden_states=_hidden_bytes(recipe, shapes, stage1) if has_cache and stage1 is not None else 0,
        hidden_limit=int(cached.disk_gb * GB) if has_cache else None,
    )


def _weights(shape: Shape, lora: LoraConfig | None, each: int) -> int:
    return shape.num_parameters * each if lora is None else 4 * shape.adapter_parameters(lora)


def _model(recipe: Recipe, shapes: Sequence[Shape], phases: Sequence[PhasePlan], each: int) -> int:
    """Specialists of the fused model; of those with adapters, which are not merged, the adapters alone.

    Adapters that were there before count as nothing: their size is not known without reading them.
    """
    trained = [phase.stage.lora for phase in phases if phase.name in ("stage1", "stage2") and phase.stage.lora]
    if not (trained or recipe.shared_base):
        return sum(_weights(shape, None, each) for shape in shapes)
    tuned = {name: source.tune.lora for name, source in recipe.specialists.items() if source.tune is not None}
    adapters = {shape.name: trained[-1] if trained else tuned.get(shape.name) for shape in shapes}
    return sum(_weights(shape, lora, each) for shape in shapes if (lora := adapters[shape.name]) is not None)


def _trained(shapes: Sequence[Shape], phase: PhasePlan, gate: int, each: int) -> int:
    gate = gate if len(phase.specialists) > 1 else 0
    if not phase.stage.train_specialists:
        return gate
    mine = [shape for shape in shapes if shape.name in phase.specialists]
    if (lora := phase.stage.lora) is not None:
        return gate + 4 * sum(shape.adapter_parameters(lora) for shape in mine)
    return gate + each * sum(shape.num_parameters for shape in mine)


def _hidden_bytes(recipe: Recipe, shapes: Sequence[Shape], stage1: PhasePlan) -> int:
    """Hidden states of every record that stage 1 draws, each once, and of its validation records."""
    records = [record for batch in stage1.batches for record in batch]
    mean = sum(record.num_response_tokens for record in records) / len(records)
    drawn = stage1.stage.steps * len(stage1.batches[0])
    if stage1.num_records:
        drawn = min(drawn, stage1.num_records) if stage1.stage.composed_share == 0 else drawn
    validation = recipe.train.validation_records * (len(recipe.data.domains) if recipe.data else 0)
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else getattr(torch, recipe.dtype)
    facts = {shape.name: SpecialistFacts("", dtype, shape.hidden_size, shape.num_parameters, None) for shape in shapes}
    return int((drawn + validation) * mean * bytes_per_token(facts))
