"""A report for people: the specialists, the memory of each phase, and the findings, worst first; or as JSON."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ultrafuser.doctor.finding import LEVELS, Level
from ultrafuser.doctor.report import Report
from ultrafuser.model.memory import gib

STYLES: dict[Level, str] = {"blocker": "bold red", "warning": "yellow", "ok": "green"}
NARROWEST = 100  # columns; a pipe has none of its own


def print_report(report: Report, *, as_json: bool = False) -> None:
    """Write a report to stdout, as a table or as JSON."""
    print_json(report.to_dict()) if as_json else print_tables(report)


def print_json(content: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(content, indent=2, ensure_ascii=False))


def print_tables(report: Report, console: Console | None = None) -> None:
    """Tables and a last line that says how many blockers and warnings there are."""
    if console is None:
        console = Console(highlight=False)
        console = console if console.is_terminal else Console(highlight=False, width=NARROWEST)
    console.print(Text(f"recipe {report.recipe}", style="bold"))
    if report.sizes:
        console.print(_specialists_table(report))
    if report.needs:
        console.print(_memory_table(report))
    console.print(_findings_table(report))
    blockers, warnings = report.count("blocker"), report.count("warning")
    verdict = f"{_plural(blockers, 'blocker')}, {_plural(warnings, 'warning')}, {report.count('ok')} ok"
    console.print(Text(verdict, style="bold red" if blockers else "bold green"))


def _specialists_table(report: Report) -> Table:
    table = Table(title="specialists", title_justify="left")
    table.add_column("name", no_wrap=True)
    table.add_column("model", overflow="fold")
    for column in ("kind", "parameters", "weights", "KV/token", "vocabulary", "hidden", "context"):
        table.add_column(column, justify="left" if column == "kind" else "right", no_wrap=column != "model")
    for size in report.sizes:
        table.add_row(
            Text(size.name),
            Text(_plain(size.model)),
            Text(size.architecture),
            f"{size.num_parameters / 1e6:,.1f}M",
            gib(size.weights_bytes),
            gib(size.kv_bytes_per_token),
            f"{size.num_rows:,}",
            f"{size.hidden_size:,}",
            "–" if size.context is None else f"{size.context:,}",
        )
    return table


def _memory_table(report: Report) -> Table:
    table = Table(title="memory before activations", title_justify="left")
    table.add_column("phase", no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    table.add_column("one checkpoint", justify="right", no_wrap=True)
    table.add_column("made of")
    for need in report.needs:
        checkpoint = gib(need.checkpoint_bytes) if need.checkpoint_bytes else "–"
        table.add_row(Text(need.phase), gib(need.bytes), checkpoint, need.made_of)
    return table


def _findings_table(report: Report) -> Table:
    table = Table(title="findings", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("about", overflow="fold")
    table.add_column("what", ratio=3, overflow="fold")
    table.add_column("what to do", ratio=2, overflow="fold")
    # Specialists are often alike: what holds for several is said once.
    subjects: dict[tuple[Level, str, str], list[str]] = {}
    for finding in report.findings:
        subjects.setdefault((finding.level, finding.what, finding.do), []).append(finding.subject)
    for shown in LEVELS:
        for (level, what, do), names in subjects.items():
            if level == shown:
                table.add_row(
                    Text(level, style=STYLES[level]),
                    Text(_plain(", ".join(dict.fromkeys(names)))),
                    Text(_plain(what)),
                    Text(_plain(do)),
                )
    return table


def _plain(text: str) -> str:
    """Names and messages come from strangers' files: nothing in them may steer the terminal."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
