"""`ultrafuser synthesize`: make a data set with other models, look at it, hand it out."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

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
    summary.check()


@synthesize.command()
def status(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """How far it is: each stage's requests and items, what gates dropped, tokens, money; also while a run goes on.

    Example: ultrafuser synthesize status recipes/ultrachat2.yaml
    """
    _check_packages()
    from ultrafuser.synthesis.load import load_synthesis
    from ultrafuser.synthesis.status import status_text
    from ultrafuser.synthesis.storage.store import Store

    loaded = load_synthesis(recipe, overrides)
    with Store.open(loaded, read_only=True) as store:
        print(status_text(store, loaded))


@synthesize.command()
def review(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    stage: Annotated[
        list[str], typer.Option(metavar="STAGE", help="On the page: these stages; default: every reviewed one.")
    ] = [],  # noqa: B006
    size: Annotated[int, typer.Option(help="Items of each stage of each domain, at most.", min=1)] = 40,
    page: Annotated[Path | None, typer.Option(help="Where to; default: review.html in the run's folder.")] = None,
    apply: Annotated[
        Path | None, typer.Option(metavar="VERDICTS", help="Write the verdicts that the page saved into the store.")
    ] = None,
    accept_stage: Annotated[
        list[str], typer.Option(metavar="STAGE", help="Accept this stage as it is: the run goes on behind it.")
    ] = [],  # noqa: B006
) -> None:
    """Write a page with a sample of topics and instructions, to be accepted or struck by a person; apply what it saved.

    Example: ultrafuser synthesize review recipes/ultrachat2.yaml --apply verdicts.json
    """
    _check_packages()
    from ultrafuser.synthesis.dataset import review as reviewing
    from ultrafuser.synthesis.load import load_synthesis
    from ultrafuser.synthesis.storage.store import Store

    loaded = load_synthesis(recipe, overrides)
    if apply is not None or accept_stage:
        with Store.open(loaded) as store:
            print(reviewing.settle(store, loaded, apply, accept_stage).text())
        return
    path = page or loaded.run_folder / "review.html"
    with Store.open(loaded, read_only=True) as store:
        reviewing.write_review(store, loaded, path, stages=stage, size=size)
    print(path)


@synthesize.command()
def export(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to; default: dataset/ in the run's folder.")
    ] = None,
    formats: Annotated[str, typer.Option(help="By comma: jsonl, parquet.")] = "jsonl,parquet",
    form: Annotated[
        Literal["messages", "ultrachat"], typer.Option(help="Of a record: with topics and origin, or id and data.")
    ] = "messages",
) -> None:
    """Write the data set: JSON lines and Parquet by domain and split, with a card; `datasets` loads the folder.

    Example: ultrafuser synthesize export recipes/ultrachat2.yaml --to data/ultrachat2
    """
    _check_packages()
    from ultrafuser.synthesis.dataset.export import export as write
    from ultrafuser.synthesis.load import load_synthesis
    from ultrafuser.synthesis.storage.store import Store

    loaded = load_synthesis(recipe, overrides)
    with Store.open(loaded, read_only=True) as store:
        print(write(store, loaded, to or loaded.run_folder / "dataset", formats=_names(formats), form=form).text())


@synthesize.command()
def stats(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PLACE", help="Count tokens of this folder or hub id; default: words.")
    ] = None,
    encoder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Embeds instructions: any model; default: by their words.")
    ] = None,
    sample: Annotated[int, typer.Option(help="Instructions of each domain that are compared.", min=2)] = 1000,
    to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to; default: stats/ in the run's folder.")
    ] = None,
) -> None:
    """The data set in numbers: records, topics, lengths, what gates dropped, diversity, a map of instructions.

    Example: ultrafuser synthesize stats recipes/ultrachat2.yaml --tokenizer runs/smollm2/base
    """
    _check_packages()
    from functools import partial

    from ultrafuser.synthesis.dataset.stats import StatsOptions, write_stats
    from ultrafuser.synthesis.load import load_synthesis
    from ultrafuser.synthesis.storage.store import Store

    options = StatsOptions(sample=sample)
    if tokenizer is not None:
        from ultrafuser.synthesis.dataset.measure import token_counter

        options = replace(options, count=token_counter(tokenizer), unit="tokens")
    if encoder is not None:
        from ultrafuser.analysis.inspection.embeddings import embed_by_encoder

        options = replace(options, embed=partial(embed_by_encoder, encoder), by=f"mean hidden states of {encoder.name}")
    loaded = load_synthesis(recipe, overrides)
    folder = to or loaded.run_folder / "stats"
    with Store.open(loaded, read_only=True) as store:
        print(write_stats(store, loaded, folder, options), end="")
    print(f"written to {folder}", file=sys.stderr)


@synthesize.command()
def domain(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the new domain, as in law or spanish_grammar.")],
    like: Annotated[str, typer.Option(help="The domain that is copied.")] = "text",
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="Gets the new domain's folder.")] = Path("domains"),
) -> None:
    """Copy a domain that comes with the package, to be made one's own: its settings and all its prompts.

    Example: ultrafuser synthesize domain law --like text --to domains
    """
    _check_packages()
    from ultrafuser.synthesis.scaffold import new_domain

    folder = new_domain(name, like=like, to=to)
    print(folder)
    print(f"edit {folder}/domain.yaml and the prompts beside it; in a recipe: ", end="", file=sys.stderr)
    print(f"domains: {{{name}: {{folder: {folder}}}}}", file=sys.stderr)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _check_packages() -> None:
    if missing := [package for module, package in NEEDED.items() if find_spec(module) is None]:
        raise ConfigError(f"synthesis needs {', '.join(missing)}: pip install 'ultrafuser[synthesis]'")
