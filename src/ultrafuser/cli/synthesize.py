"""`ultrafuser synthesize`: make a data set with other models, look at it, hand it out."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ultrafuser.cli.options import RecipePath
from ultrafuser.errors import ConfigError

NEEDED = {"openai": "openai", "sqlalchemy": "sqlalchemy", "datasketch": "datasketch", "json_repair": "json-repair"}

Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the recipe, as in limits.max_cost=5."),
]


class DefaultGroup(TyperGroup):
    """A group whose first word may be an argument of its default command: `synthesize RECIPE` is a run."""

    default_command = "run"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default command in front of anything that is neither a command nor a call for help."""
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            args = [self.default_command, *args]
        return super().parse_args(ctx, args)


synthesize = typer.Typer(cls=DefaultGroup, no_args_is_help=True, rich_markup_mode=None)


@synthesize.callback()
def group() -> None:
    """Make a data set of instructions and answers by other models (UltraChat 2).

    `synthesize RECIPE` alone is a run; a recipe whose name is that of a command is written ./NAME.
    """


@synthesize.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006  typer copies it
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would take; nothing is asked.")] = False,
    from_stage: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE", help="Forget what follows from here on and read it anew from answers."),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Ask again what was given up.")] = False,
    only: Annotated[str, typer.Option(metavar="DOMAINS", help="These domains, by comma; default: all.")] = "",
) -> None:
    """Make the data set, or go on with it: stop it at any moment, nothing that was answered is asked twice.

    Example: ultrafuser synthesize recipes/ultrachat2.yaml --dry-run
    """
    _check_packages()
    from ultrafuser.synthesis.load import load_synthesis

    loaded = load_synthesis(recipe, overrides)
    if dry_run:
        from ultrafuser.synthesis.estimate import estimate

        print(estimate(loaded).table())
        return
    from ultrafuser.synthesis.pipeline import run_synthesis
    from ultrafuser.synthesis.progress import live_table

    with live_table() as watch:
        summary = run_synthesis(
            loaded, from_stage=from_stage, retry_failed=retry_failed, only=_names(only), watch=watch
        )
    print(summary.text())


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _check_packages() -> None:
    if missing := [package for module, package in NEEDED.items() if find_spec(module) is None]:
        raise ConfigError(f"synthesis needs {', '.join(missing)}: pip install 'ultrafuser[synthesis]'")
