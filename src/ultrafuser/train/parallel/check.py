"""What `parallel.mode: specialist` cannot do, found out before any weight is loaded."""

from __future__ import annotations

from ultrafuser.config.recipe import Recipe
from ultrafuser.errors import ConfigError
from ultrafuser.model.backbone import linear_head
from ultrafuser.model.outline import outline

# Every step waits for the largest specialist, and every process needs the memory of the largest.
LARGEST_DIFFERENCE = 0.25


def check_specialist_mode(recipe: Recipe, *, num_processes: int) -> None:
    """Refuse a recipe that `parallel.mode: specialist` is not for; reads configurations alone.

    Args:
        recipe: With that mode.
        num_processes: Of the run.

    Raises:
        ConfigError: Says which setting, number of processes or specialist does not fit, and what to do.
        ModelError: A specialist has no configuration.
    """
    mode = "train.parallel.mode: specialist"
    names = list(recipe.specialists)
    if len(names) < 2:
        raise ConfigError(f"{mode} is for several specialists, and the recipe has {names[0]!r} alone: set mode: fsdp")
    if num_processes % len(names):
        whole = max(1, num_processes // len(names)) * len(names)
        choices = f"{whole}" if num_processes < len(names) else f"{whole} or {whole + len(names)}"
        raise ConfigError(
            f"{mode} needs equally many processes for each of the {len(names)} specialists, and there "
            f"{'is' if num_processes == 1 else 'are'} {num_processes}: start {choices} (torchrun --nproc-per-node), or "
            "set mode: fsdp"
        )
    train = recipe.train
    for setting, value, fits, why in (
        ("fusion.space", recipe.fusion.space, "logits", "weighted logits are what the processes add up"),
        ("train.loss_backend", train.loss_backend, "chunked", "the others want all heads in one process"),
        ("train.stage1_cache.mode", train.stage1_cache.mode, "off", "the cache keeps one specialist at a time"),
        ("train.parallel.cpu_offload", train.parallel.cpu_offload, False, "weights stay where they are used"),
        ("shared_base", recipe.shared_base, False, "there is one base, and nothing to give to a process each"),
    ):
        if value != fits:
            raise ConfigError(f"{mode} cannot go with {setting}: {value}, since {why}: set one of them otherwise")
    for stage, settings in (("stage1", recipe.stage1), ("stage2", recipe.stage2)):
        if settings is not None and settings.lora is not None:
            raise ConfigError(f"{mode} cannot go with {stage}.lora: adapters are trained in mode: fsdp")
    _check_specialists(recipe, mode)


def _check_specialists(recipe: Recipe, mode: str) -> None:
    sizes: dict[str, int] = {}
    for name, source in recipe.specialists.items():
        model = outline(source, name=name)
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
        if linear_head(model) is None:
            raise ConfigError(
                f"{mode} adds up weighted logits, but the head of specialist {name!r} ({type(model).__name__}) is "
                "more than one linear layer: set mode: fsdp"
            )
    smallest, largest = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    if sizes[largest] > sizes[smallest] * (1 + LARGEST_DIFFERENCE):
        raise ConfigError(
            f"{mode} gives equally many processes to each specialist, but {largest!r} has {_number(sizes[largest])} "
            f"parameters and {smallest!r} {_number(sizes[smallest])}: over {LARGEST_DIFFERENCE:.0%} more, so the "
            "others would wait for it; set mode: fsdp"
        )


def _number(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e8 else f"{count:,}"
