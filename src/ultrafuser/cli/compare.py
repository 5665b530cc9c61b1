"""`ultrafuser compare`: every baseline of a recipe beside the fusion, in one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from ultrafuser.cli.options import Overrides, RecipePath, Sources, parse_sources
from ultrafuser.cli.progress import evaluation_bars, silence_other_bars


def compare(
    recipe: RecipePath,
    exam: Annotated[
        str,
        typer.Option(
            help="What to compare on: held-out (records of the recipe's data), demo (its exam) or benchmarks."
        ),
    ] = "held-out",
    limit: Annotated[int, typer.Option(min=1, help="Records or questions per domain.")] = 200,
    only: Annotated[str, typer.Option(help="Names of models, separated by commas; default: all.")] = "",
    tasks: Annotated[str, typer.Option(metavar="NAMES", help="Benchmarks: tasks and groups, by comma.")] = "paper",
    data: Annotated[
        Path | None, typer.Option(help="Folder with the benchmarks' files.", envvar="ULTRAFUSER_DATA")
    ] = None,
    source: Sources = [],  # noqa: B006  typer copies it
    max_tokens: Annotated[
        int | None, typer.Option(help="No answer to a benchmark is longer, whatever its task allows.", min=1)
    ] = None,
    reward_model: Annotated[
        str | None, typer.Option(help="Folder or hub id of a reward model, to choose among the specialists' answers.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="URL#MODEL", help="A judge at an OpenAI-compatible endpoint, for the same.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006  typer copies it
) -> None:
    """Make, train and examine the specialists, merges, mixtures, ensembles and the fusion; go on where it stopped.

    Example: ultrafuser compare runs/demo/recipe.yaml --exam demo
    """
    silence_other_bars()
    from ultrafuser.compare.run import compare as run
    from ultrafuser.compare.run import print_comparison
    from ultrafuser.config.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    names = [name for name in only.split(",") if name]
    folder = loaded.folder / "compare"
    bars = evaluation_bars() if exam == "benchmarks" else nullcontext()
    with _judge(judge, folder / "judge.jsonl") as ask, bars as watch:
        comparison = run(
            loaded,
            exam=exam,
            limit=limit,
            only=names,
            tasks=[name for name in tasks.split(",") if name] if exam == "benchmarks" else [],
            data=data,
            places=parse_sources(source),
            max_tokens=max_tokens,
            reward_model=reward_model,
            ask_judge=ask,
            judge_name=judge or "a judge",
            watch=watch,
        )
    print_comparison(comparison, folder)


@contextmanager
def _judge(place: str | None, journal: Path) -> Iterator[Callable[[Sequence[str]], list[str]] | None]:
    """How to ask the judge, each reply kept in a journal; None without one."""
    if place is None:
        yield None
        return
    from ultrafuser.evaluation.journal import Journal
    from ultrafuser.evaluation.judges.client import Judge, Question, parse_judge

    options = parse_judge(place)
    with Journal(journal) as kept:
        asked = Judge(options, kept)
        yield lambda prompts: asked.ask([Question("", prompt) for prompt in prompts])
