"""The estimate of a recipe on some devices: every phase with memory, work and verdict, and what would make it fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ultrafuser.config.recipe import Recipe
from ultrafuser.train.estimate.batches import PhasePlan, Phases, plan_phases
from ultrafuser.train.estimate.devices import Devices
from ultrafuser.train.estimate.disk import Disk, measure_disk
from ultrafuser.train.estimate.memory import Job, Memory, measure_memory, overhead_bytes
from ultrafuser.train.estimate.shapes import Shape, gate_parameters, read_shape
from ultrafuser.train.estimate.work import Work, measure_work


@dataclass(frozen=True, slots=True)
class PhaseEstimate:
    """One phase.

    Attributes:
        name: Of the phase.
        trained_parameters: What an optimizer step changes.
        memory: Of one device, at its peak.
        overhead_bytes: What of a device is no use for tensors.
        work: Tokens, operations, hours.
        fits: Whether a device holds it.
        remedies: Settings of which each alone makes it fit, as `--set` takes them, or `--devices`.
    """

    name: str
    trained_parameters: int
    memory: Memory
    overhead_bytes: int
    work: Work
    fits: bool
    remedies: tuple[str, ...] = ()

    @property
    def needed_bytes(self) -> int:
        """Of one device, in all."""
        return self.memory.num_bytes + self.overhead_bytes


@dataclass(frozen=True, slots=True)
class Ingredients:
    """What an estimate is made of but for settings, so that settings can be tried without reading anything again."""

    shapes: tuple[Shape, ...]
    phases: Phases


@dataclass(frozen=True, slots=True)
class Estimate:
    """A recipe on some devices."""

    recipe: str
    devices: Devices
    shapes: tuple[Shape, ...]
    gate_parameters: int
    counted: str
    phases: tuple[PhaseEstimate, ...]
    disk: Disk
    free_disk_bytes: int
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether every phase fits."""
        return all(phase.fits for phase in self.phases)

    @property
    def hours(self) -> float:
        """Of all phases."""
        return sum(phase.work.hours for phase in self.phases)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        phases = [
            {**asdict(phase), "needed_bytes": phase.needed_bytes, "memory_bytes": phase.memory.num_bytes}
            for phase in self.phases
        ]
        return {
            "recipe": self.recipe,
            "fits": self.fits,
            "hours": self.hours,
            "flops": sum(phase.work.flops for phase in self.phases),
            "devices": asdict(self.devices),
            "specialists": {shape.name: asdict(shape) for shape in self.shapes},
            "gate_parameters": self.gate_parameters,
            "counted": self.counted,
            "phases": phases,
            "disk": {**asdict(self.disk), "num_bytes": self.disk.num_bytes, "free_bytes": self.free_disk_bytes},
            "notes": list(self.notes),
        }


def gather_ingredients(recipe: Recipe, *, tokens: tuple[int, int] | None = None) -> Ingredients:
    """Read configurations, tokenizer and data; no weights.

    Args:
        recipe: Whose.
        tokens: Prompt and response tokens of every record, instead of data.

    Raises:
        UltrafuserError: Something of it cannot be read; one line.
    """
    shapes = tuple(read_shape(source, name=name) for name, source in recipe.specialists.items())
    return Ingredients(shapes, plan_phases(recipe, tokens=tokens))


def estimate_phases(recipe: Recipe, devices: Devices, ingredients: Ingredients) -> tuple[PhaseEstimate, ...]:
    """Every phase under the recipe's settings; the stages of the recipe may differ from those it was planned with."""
    return tuple(estimate_phase(recipe, devices, ingredients, plan) for plan in ingredients.phases.phases)


def estimate_phase(recipe: Recipe, devices: Devices, ingredients: Ingredients, plan: PhasePlan) -> PhaseEstimate:
    """One of the phases that `ingredients` were gathered for."""
    stage = {"stage1": recipe.stage1, "stage2": recipe.stage2}.get(plan.name) or plan.stage
    return _estimate(_make_job(recipe, devices, plan, ingredients.shapes, stage=stage), devices, plan)


def _make_job(recipe: Recipe, devices: Devices, plan: PhasePlan, shapes: Sequence[Shape], *, stage: Any) -> Job:
    mine = tuple(shape for shape in shapes if shape.name in plan.specialists)
    draft = Job(recipe, stage, mine, (), devices.count, devices.is_cpu)
    parts = draft.parts if draft.is_split else devices.count
    pieces = plan.pieces(parts=parts, max_columns=recipe.train.micro_batch_tokens)
    return Job(recipe, stage, mine, pieces, devices.count, devices.is_cpu)


def _estimate(job: Job, devices: Devices, plan: PhasePlan) -> PhaseEstimate:
    memory = measure_memory(job)
    overhead = overhead_bytes(job, devices.memory_bytes)
    work = measure_work(job, devices, columns=plan.columns, responses=plan.responses)
    gate = gate_parameters(job.shapes, job.recipe)
    trained = 0
    if job.trains_everything:
        trained = sum(shape.num_parameters for shape in job.shapes)
    elif job.stage.train_specialists and job.stage.lora is not None:
        trained = sum(shape.adapter_parameters(job.stage.lora) for shape in job.shapes)
    fits = memory.num_bytes + overhead <= devices.memory_bytes
    return PhaseEstimate(plan.name, trained + gate, memory, overhead, work, fits)


def measure_files(recipe: Recipe, ingredients: Ingredients) -> Disk:
    """What the run writes."""
    return measure_disk(recipe, ingredients.shapes, ingredients.phases.phases)
