"""The examination of a recipe: every check in order, gathered in one report, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ultrafuser.chat.template import Template
from ultrafuser.config.recipe import Recipe
from ultrafuser.doctor.architecture import check_dtype, check_model, check_positions, check_sizes
from ultrafuser.doctor.data import check_data
from ultrafuser.doctor.facts import Facts, gather_all
from ultrafuser.doctor.files import check_files
from ultrafuser.doctor.finding import Finding, Level, ok, warning
from ultrafuser.doctor.licences import check_licences
from ultrafuser.doctor.machine import Machine, free_disk_bytes, inspect_machine
from ultrafuser.doctor.memory import Need, Size, check_disk, check_memory, measure, plan
from ultrafuser.doctor.templates import check_template, find_templates, sample_prompt
from ultrafuser.doctor.vocabulary import check_start_tokens, check_stop_tokens, check_vocabulary
from ultrafuser.model.memory import gib


@dataclass(frozen=True, slots=True)
class Report:
    """What the doctor found.

    Attributes:
        recipe: Name of the recipe.
        findings: In the order of the checks.
        sizes: The specialists whose configuration is known.
        needs: Memory of every phase; empty unless all specialists are known.
        machine: What there is.
    """

    recipe: str
    findings: tuple[Finding, ...]
    sizes: tuple[Size, ...]
    needs: tuple[Need, ...]
    machine: Machine

    @property
    def has_blocker(self) -> bool:
        """Whether building or training would fail."""
        return any(finding.level == "blocker" for finding in self.findings)

    def count(self, level: Level) -> int:
        """Findings of one level."""
        return sum(finding.level == level for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "recipe": self.recipe,
            "has_blocker": self.has_blocker,
            "findings": [asdict(finding) for finding in self.findings],
            "specialists": {size.name: asdict(size) for size in self.sizes},
            "memory": {need.phase: asdict(need) for need in self.needs},
            "machine": asdict(self.machine),
        }


def examine(recipe: Recipe, *, machine: Machine | None = None) -> Report:
    """Check a recipe without loading weights.

    The hub is asked for small files only, and only if it answers at once.

    Args:
        recipe: What to check.
        machine: Where it should run; None: here.
    """
    machine = machine if machine is not None else inspect_machine()
    specialists, shared = gather_all(recipe)
    templates, findings = find_templates(specialists, shared)
    sizes = [size for facts in specialists if (size := measure(facts, recipe)) is not None]
    needs = plan(sizes, recipe) if len(sizes) == len(specialists) else []
    findings = [
        *_check_specialists(specialists, shared),
        *check_vocabulary(specialists, shared),
        *findings,
        *_check_templates(templates, specialists, shared, recipe),
        *check_sizes(specialists),
        *check_positions(specialists, recipe),
        *check_dtype(specialists, recipe),
        *check_licences(specialists),
        *check_data(recipe),
        *_check_machine(machine, needs, sizes, specialists, recipe),
    ]
    return Report(recipe.name, tuple(findings), tuple(sizes), tuple(needs), machine)


def _check_specialists(specialists: Sequence[Facts], shared: Facts) -> Iterator[Finding]:
    for facts in specialists:
        yield from check_files(facts)
        yield from check_model(facts)
    if all(shared is not facts for facts in specialists):
        yield from check_files(shared)


def _check_templates(
    templates: dict[str, Template], specialists: Sequence[Facts], shared: Facts, recipe: Recipe
) -> Iterator[Finding]:
    prompts = {}
    for name, template in templates.items():
        yield from check_template(name, template, recipe, shared.tokenizer)
        if (prompt := sample_prompt(template, shared.tokenizer)) is not None:
            prompts[name] = prompt
    if shared.tokenizer is not None:
        yield from check_start_tokens(shared, prompts)
        yield from check_stop_tokens(specialists, shared, templates)


def _check_machine(
    machine: Machine, needs: Sequence[Need], sizes: Sequence[Size], specialists: Sequence[Facts], recipe: Recipe
) -> Iterator[Finding]:
    gpu = f"{machine.gpu_name} with {gib(machine.gpu_bytes)}" if machine.gpu_bytes is not None else "no GPU"
    yield ok("machine", f"{machine.num_cores} cores, {gib(machine.ram_bytes)} RAM, {gpu}")
    if not needs:
        names = {size.name for size in sizes}
        unknown = ", ".join(facts.name for facts in specialists if facts.name not in names)
        yield warning("memory", f"cannot be worked out without the configuration of {unknown}", "see above")
        return
    yield from check_memory(needs, sizes, machine, recipe)
    yield from check_disk(needs, sizes, free_disk_bytes(recipe.folder), recipe)
