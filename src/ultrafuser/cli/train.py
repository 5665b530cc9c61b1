"""`ultrafuser train`: from a recipe to a fused model."""

from __future__ import annotations

from ultrafuser.cli.options import Overrides, RecipePath


def train(recipe: RecipePath, overrides: Overrides = []) -> None:  # noqa: B006  typer copies it
    """Train the gate, then the gate and the specialists together; go on where a stopped run was.

    Example: ultrafuser train recipes/smollm2.yaml --set stage1.steps=20
    """
    from ultrafuser.config.load import load_recipe
    from ultrafuser.train.pipeline import train as run

    print(run(load_recipe(recipe, overrides)))
