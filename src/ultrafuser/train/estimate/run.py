"""The whole estimate of a recipe, as `ultrafuser train RECIPE --dry-run` shows it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ultrafuser.config.recipe import Recipe
from ultrafuser.errors import ConfigError
from ultrafuser.train.estimate.advice import find_remedies
from ultrafuser.train.estimate.devices import Devices, parse_devices, this_machine
from ultrafuser.train.estimate.estimate import Estimate, Ingredients, estimate_phases, gather_ingredients, measure_files
from ultrafuser.train.estimate.shapes import gate_parameters
from ultrafuser.train.parallel.check import check_specialist_mode


def estimate_recipe(
    recipe: Recipe, *, devices: str | None = None, tokens: str | None = None, utilisation: float | None = None
) -> Estimate:
    """What a recipe takes, without loading a weight.

    Args:
        recipe: To be trained.
        devices: Such as `16xA100-80GB`; None: this machine, measured.
        tokens: Prompt and response tokens of every record, such as `100+400`, instead of reading data.
        utilisation: Part of the devices' rate that training reaches; None: a rule of thumb.

    Raises:
        UltrafuserError: Something that training would refuse as well, or an option that makes no sense; one line.
    """
    if utilisation is not None and not 0 < utilisation <= 1:
        raise ConfigError(f"--utilisation {utilisation:g}: give a part of the devices' rate, above 0 and at most 1")
    lengths = parse_tokens(tokens) if tokens is not None else None
    if devices is not None:
        chosen = parse_devices(devices, utilisation=utilisation)
    else:
        chosen = this_machine(recipe.train.device, utilisation=utilisation)
    if recipe.train.parallel.mode == "specialist" and chosen.count > 1:
        check_specialist_mode(recipe, num_processes=chosen.count)
    ingredients = gather_ingredients(recipe, tokens=lengths)
    phases = tuple(
        phase if phase.fits else replace(phase, remedies=find_remedies(recipe, chosen, ingredients, phase))
        for phase in estimate_phases(recipe, chosen, ingredients)
    )
    return Estimate(
        recipe=recipe.name,
        devices=chosen,
        shapes=ingredients.shapes,
        gate_parameters=gate_parameters(ingredients.shapes, recipe),
        counted=ingredients.phases.counted,
        phases=phases,
        disk=measure_files(recipe, ingredients),
        free_disk_bytes=_free_bytes(recipe.folder),
        notes=tuple(_notes(recipe, chosen, ingredients)),
    )


def parse_tokens(text: str) -> tuple[int, int]:
    """Prompt and response tokens from `100+400`.

    Raises:
        ConfigError: It is written otherwise.
    """
    match = re.fullmatch(r"(\d+)\+(\d+)", text)
    if match is None or not int(match[1]) or not int(match[2]):
        raise ConfigError(f"--tokens {text!r}: write PROMPT+RESPONSE, as in 100+400")
    return int(match[1]), int(match[2])


def _notes(recipe: Recipe, devices: Devices, ingredients: Ingredients) -> Iterator[str]:
    if others := sorted({shape.architecture for shape in ingredients.shapes if not shape.is_llama_like}):
        yield f"activations of {', '.join(others)} follow a rule of thumb; those of Llama-like models are exact"
    if devices.is_cpu:
        yield (
            f"the rate of a core was measured by a matrix product on this machine; training is taken to reach "
            f"{devices.utilisation:.0%} of it; memory leaves out some 0.5 GiB that Python and torch hold"
        )
    else:
        yield f"training is taken to reach {devices.utilisation:.0%} of the devices' rate (--utilisation)"
    if devices.count > 1 and recipe.train.stage1_cache.mode != "off":
        yield "stage 1 from hidden states on disk runs in one process"


def _free_bytes(folder: Path) -> int:
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free
