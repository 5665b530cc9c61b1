"""Arguments that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ultrafuser.errors import ConfigError

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe: a YAML file.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the recipe, as in stage1.steps=20.")
]
Sources = Annotated[
    list[str], typer.Option("--source", metavar="BENCHMARK=PLACE", help="A file, folder or hub:OWNER/NAME#SPLIT.")
]


def parse_sources(sources: list[str]) -> dict[str, str]:
    """Places by benchmark.

    Raises:
        ConfigError: One is not BENCHMARK=PLACE.
    """
    places = {}
    for source in sources:
        benchmark, sign, place = source.partition("=")
        if not sign or not place:
            raise ConfigError(f"--source {source!r}: write BENCHMARK=PLACE, as in math=problems.jsonl")
        places[benchmark] = place
    return places
