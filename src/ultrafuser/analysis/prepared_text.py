"""Prepared data as text: tables of counts, the problems met, and records token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean, median

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ultrafuser.analysis.prepared import DomainCount, Preparation, prepare
from ultrafuser.analysis.token_view import render_legend, render_view, view_record
from ultrafuser.config.recipe import Recipe
from ultrafuser.data.split import SPLITS

NARROWEST = 110  # columns; a pipe has none of its own


def print_preparation(recipe: Recipe, *, show: int = 0, console: Console | None = None) -> None:
    """Prepare a recipe's data and print what came of it.

    Args:
        recipe: With a data section.
        show: Records of every domain to print token by token, as each specialist sees them.
        console: Where to print; None: stdout.

    Raises:
        UltrafuserError: As `prepare`.
    """
    console = console if console is not None else new_console()
    preparation = prepare(recipe, num_shown=show)
    print_counts(preparation, console)
    if show:
        print_records(preparation, console)


def new_console() -> Console:
    """Stdout, wide enough for the tables where it is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=NARROWEST)


def print_counts(preparation: Preparation, console: Console) -> None:
    """Records at every step, lengths in tokens, and what a user should know."""
    console.print(_records_table(preparation))
    console.print(_tokens_table(preparation))
    for domain, count in preparation.domains.items():
        for line in _remarks(domain, count, preparation):
            console.print(Text(line), soft_wrap=True)


def print_records(preparation: Preparation, console: Console) -> None:
    """The first training records of every domain, once for each specialist."""
    colour = console.is_terminal and not console.no_color
    console.print()
    console.print(render_legend(colour=colour), soft_wrap=True)
    for domain, count in preparation.domains.items():
        for record, encoded in count.first:
            trained = f"{encoded.num_columns} columns, {encoded.num_response_tokens} trained"
            console.print()
            console.print(Text(f"{domain}: {record.source} ({trained})", style="bold"), soft_wrap=True)
            views = view_record(encoded, preparation.encoder)
            for name, tokens in zip(preparation.names, views, strict=True):
                console.print(Text(f"  {name}, {len(tokens)} tokens", style="italic"))
                console.print(Padding(render_view(tokens, colour=colour), (0, 0, 0, 4)))


def _records_table(preparation: Preparation) -> Table:
    table = Table(title="records", title_justify="left")
    table.add_column("domain", no_wrap=True)
    for column in ("usable", "bad", "duplicates", "overlapping", "too long", "cut", *SPLITS):
        table.add_column(column, justify="right")
    for domain, count in preparation.domains.items():
        report = count.report
        numbers = [report.read, report.problems.total, report.duplicates, report.overlapping, count.left_out, count.cut]
        numbers += [count.kept[split] for split in SPLITS]
        table.add_row(Text(domain), *(f"{number:,}" for number in numbers))
    return table


def _tokens_table(preparation: Preparation) -> Table:
    table = Table(title=f"tokens of training records (at most {preparation.data.max_length:,})", title_justify="left")
    table.add_column("domain", no_wrap=True)
    for column in ("columns: mean", "median", "95%", "longest", "trained: mean", "in all", "share"):
        table.add_column(column, justify="right")
    for domain, count in preparation.domains.items():
        columns, trained = sorted(count.columns), sum(count.response_tokens)
        table.add_row(
            Text(domain),
            f"{fmean(columns):,.0f}",
            f"{median(columns):,.0f}",
            f"{_quantile(columns, 0.95):,}",
            f"{columns[-1]:,}",
            f"{fmean(count.response_tokens):,.0f}",
            f"{trained:,}",
            f"{trained / sum(columns):.0%}",
        )
    return table


def _remarks(domain: str, count: DomainCount, preparation: Preparation) -> Iterator[str]:
    problems = count.report.problems
    if problems.total:
        yield f"{domain}: {problems.total} bad records were skipped ({problems.summary()}); the first of each kind:"
        seen = set()
        for problem in problems.examples:
            if problem.kind not in seen:
                yield f"  {problem.kind}: {problem.message}"
            seen.add(problem.kind)
    limit = f"over {preparation.data.max_length} tokens"
    if count.left_out:
        yield f"{domain}: {count.left_out} records are {limit} and were left out"
    if count.cut:
        yield (
            f"{domain}: {count.cut} records are {limit} and were cut; {count.stop_untrained} of them lost the stop "
            "token, so they do not teach to stop (data.overlength: drop leaves them out)"
        )
    if not count.kept["validation"]:
        yield f"{domain}: no record validates; raise data.validation_fraction to see the loss on unseen records"


def _quantile(ordered: Sequence[int], part: float) -> int:
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]
