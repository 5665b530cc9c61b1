"""`ultrafuser prepare`: look at the data of a recipe as each specialist sees it."""

from __future__ import annotations

from typing import Annotated

import typer

from ultrafuser.cli.options import Overrides, RecipePath


def prepare(
    recipe: RecipePath,
    show: Annotated[int, typer.Option(help="Print this many records of every domain, token by token.", min=0)] = 0,
    overrides: Overrides = [],  # noqa: B006  typer copies it
) -> None:
    """Read, check and split a recipe's data; show what is trained and what is not.

    Example: ultrafuser prepare recipes/smollm2.yaml --show 3
    """
    from ultrafuser.analysis.prepared_text import print_preparation
    from ultrafuser.config.load import load_recipe

    print_preparation(load_recipe(recipe, overrides), show=show)
