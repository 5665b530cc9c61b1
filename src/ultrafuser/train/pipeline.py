"""Training a recipe, in one process or as one of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ultrafuser.config.recipe import Recipe
from ultrafuser.train.parallel.check import check_specialist_mode
from ultrafuser.train.parallel.trainer import ParallelTrainer
from ultrafuser.train.parallel.world import begin_world
from ultrafuser.train.trainer import Trainer


def train(recipe: Recipe, *, callbacks: Sequence[object] = (), recipe_file: Path | None = None) -> Path:
    """Train what a recipe describes; returns the folder of the fused model. See `Trainer`.

    Started by torchrun, this is one of several processes of a run, and all of them do it together.
    """
    parallel = recipe.train.parallel
    with begin_world(recipe.train.device, timeout_s=parallel.timeout_s) as world:
        if parallel.mode == "specialist":
            with world.together():
                check_specialist_mode(recipe, num_processes=world.size)
        if world.size == 1:
            trainer = Trainer(recipe, callbacks=callbacks)
            trainer.recipe_file = recipe_file
            return trainer.run()
        with world.together():
            parallel_trainer = ParallelTrainer(recipe, world, callbacks=callbacks)
        parallel_trainer.recipe_file = recipe_file
        return parallel_trainer.run()
