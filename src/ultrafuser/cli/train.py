"""`ultrafuser train`: from a recipe to a fused model, or what that would take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ultrafuser.cli.options import Overrides, RecipePath
from ultrafuser.errors import ConfigError


def train(
    recipe: RecipePath,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, and train nothing: no weights are loaded.")
    ] = False,
    devices: Annotated[
        str | None,
        typer.Option(metavar="COUNTxDEVICE", help="With --dry-run: on paper, as in 16xA100-80GB; else this machine."),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="PROMPT+RESPONSE", help="With --dry-run: tokens of every record, as in 100+400; reads no data."
        ),
    ] = None,
    utilisation: Annotated[
        float | None,
        typer.Option(metavar="PART", help="With --dry-run: part of the devices' rate that training reaches."),
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="With --dry-run: write everything to this file.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006  typer copies it
) -> None:
    """Train the gate, then the gate and the specialists together; go on where a stopped run was.

    With --dry-run it exits 1 where something would not fit.

    Example: ultrafuser train recipes/smollm2.yaml --set stage1.steps=20
    """
    from ultrafuser.config.load import load_recipe

    is_main = os.environ.get("RANK", "0") == "0"  # of several processes one tells
    if dry_run:
        from ultrafuser.train.estimate.run import estimate_recipe
        from ultrafuser.train.estimate.show import print_estimate, write_json

        estimate = estimate_recipe(
            load_recipe(recipe, overrides), devices=devices, tokens=tokens, utilisation=utilisation
        )
        if is_main:
            print_estimate(estimate)
            if as_json is not None:
                write_json(estimate, as_json)
        raise typer.Exit(0 if estimate.fits else 1)
    given = {"--devices": devices, "--tokens": tokens, "--utilisation": utilisation, "--json": as_json}
    if without := [option for option, value in given.items() if value is not None]:
        raise ConfigError(f"{without[0]} is for --dry-run")
    from ultrafuser.train.pipeline import train as run

    folder = run(load_recipe(recipe, overrides), recipe_file=recipe)
    if is_main:
        print(folder)
