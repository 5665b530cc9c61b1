"""Which single setting would make a phase fit: each is tried, and told only where the estimate then says it fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ultrafuser.config.load import apply_override, parse_recipe
from ultrafuser.config.recipe import Recipe
from ultrafuser.errors import ConfigError
from ultrafuser.train.estimate.devices import Devices
from ultrafuser.train.estimate.estimate import Ingredients, PhaseEstimate, estimate_phase

MOST_DEVICES = 1024
TOGETHER = ("train.activation_checkpointing=true", "train.micro_batch_tokens=1024", "train.loss_chunk=256")


def find_remedies(recipe: Recipe, devices: Devices, ingredients: Ingredients, phase: PhaseEstimate) -> tuple[str, ...]:
    """Settings of which each alone makes a phase fit; where none does, all that save activations, and devices."""
    found = [text for text in _settings(recipe, phase) if _fits(recipe, [text], devices, ingredients, phase.name)]
    found += _fewer_columns(recipe, devices, ingredients, phase.name)
    more = _more_devices(recipe, devices, ingredients, phase.name)
    if not found and not more:
        together = [text for text in TOGETHER if not _is_set(recipe, text)]
        if _fits(recipe, together, devices, ingredients, phase.name):
            return (" and ".join(together),)
        more = _more_devices(recipe, devices, ingredients, phase.name, together)
        return tuple(" and ".join([*together, text]) for text in more)
    return (*found, *more)


def with_settings(recipe: Recipe, overrides: list[str]) -> Recipe:
    """A recipe with settings changed as `--set` does.

    Raises:
        ConfigError: They do not go together.
    """
    tree = recipe.model_dump(mode="json")
    for override in overrides:
        apply_override(tree, override)
    return parse_recipe(tree)


def _settings(recipe: Recipe, phase: PhaseEstimate) -> Iterator[str]:
    train = recipe.train
    if not train.activation_checkpointing:
        yield "train.activation_checkpointing=true"
    if train.loss_chunk > 256:
        yield "train.loss_chunk=256"
    if train.precision == "fp32":
        yield "train.precision=bf16"
    if recipe.dtype == "float32":
        yield "dtype=bfloat16"
    if phase.name == "stage1" and train.stage1_cache.mode == "off":
        yield "train.stage1_cache.mode=window"
    for mode in ("fsdp", "specialist"):
        if train.parallel.mode != mode:
            yield f"train.parallel.mode={mode}"
    if not train.parallel.cpu_offload:
        yield "train.parallel.cpu_offload=true"
    if phase.name == "stage2" and recipe.stage2 is not None and recipe.stage2.lora is None:
        yield "stage2.lora.rank=16"


def _fewer_columns(recipe: Recipe, devices: Devices, ingredients: Ingredients, phase: str) -> Iterator[str]:
    """The largest halving of the pieces that fits."""
    columns = recipe.train.micro_batch_tokens // 2
    while columns >= 128:
        text = f"train.micro_batch_tokens={columns}"
        if _fits(recipe, [text], devices, ingredients, phase):
            yield text
            return
        columns //= 2


def _more_devices(
    recipe: Recipe,
    devices: Devices,
    ingredients: Ingredients,
    phase: str,
    overrides: list[str] = [],  # noqa: B006
) -> list[str]:
    """The fewest doublings of the devices that are enough; processes of one machine do not add memory to it."""
    count = 2 * devices.count
    while count <= MOST_DEVICES and not devices.is_cpu:
        if _fits(recipe, overrides, replace(devices, count=count), ingredients, phase):
            return [f"--devices {count}x{devices.name}"]
        count *= 2
    return []


def _fits(recipe: Recipe, overrides: list[str], devices: Devices, ingredients: Ingredients, phase: str) -> bool:
    try:
        changed = with_settings(recipe, overrides)
    except ConfigError:
        return False  # a setting that does not go with the others is no remedy
    mode = changed.train.parallel.mode
    if mode == "specialist" and (devices.count % len(ingredients.shapes) or devices.count < len(ingredients.shapes)):
        return False
    plan = next(plan for plan in ingredients.phases.phases if plan.name == phase)
    return estimate_phase(changed, devices, ingredients, plan).fits


def _is_set(recipe: Recipe, text: str) -> bool:
    return with_settings(recipe, [text]) == recipe
