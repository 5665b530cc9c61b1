"""An estimate for people: tables on stdout; or as JSON in a file."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ultrafuser.files import write_text_atomically
from ultrafuser.model.memory import gib
from ultrafuser.train.estimate.estimate import Estimate, PhaseEstimate

NARROWEST = 120  # columns; a pipe has none of its own


def write_json(estimate: Estimate, path: Path) -> None:
    """The whole estimate as one JSON object."""
    write_text_atomically(json.dumps(estimate.to_dict(), indent=1) + "\n", path)


def print_estimate(estimate: Estimate, console: Console | None = None) -> None:
    """Specialists, phases, what each holds, what it writes, and a last line with the verdict."""
    if console is None:
        console = Console(highlight=False)
        console = console if console.is_terminal else Console(highlight=False, width=NARROWEST)
    devices = estimate.devices
    console.print(Text(f"recipe {estimate.recipe} on {devices}, {gib(devices.memory_bytes)} each", style="bold"))
    console.print(_specialists(estimate))
    console.print(_work(estimate))
    console.print(_memory(estimate))
    console.print(Text(_disk(estimate)))
    for line in (estimate.counted, *estimate.notes):
        console.print(Text(f"note: {line}", style="dim"))
    for phase in estimate.phases:
        if not phase.fits:
            console.print(Text(_refusal(estimate, phase), style="bold red"))
    if estimate.disk.num_bytes > estimate.free_disk_bytes:
        console.print(Text("the disk is too small: lower train.keep_checkpoints, or set output to a larger one", "red"))
    hours = f"{_hours(estimate.hours)} in all, {sum(phase.work.flops for phase in estimate.phases):.2e} FLOPs"
    verdict = "everything fits" if estimate.fits else "it does not fit"
    console.print(Text(f"{verdict}; {hours}", style="bold green" if estimate.fits else "bold red"))


def _specialists(estimate: Estimate) -> Table:
    table = _table("parameters", "specialist", "kind", "parameters", "layers", "hidden", "vocabulary")
    for shape in estimate.shapes:
        numbers = (shape.num_layers, shape.hidden_size, shape.vocabulary)
        table.add_row(
            Text(shape.name), shape.architecture, _count(shape.num_parameters), *(f"{number:,}" for number in numbers)
        )
    if estimate.gate_parameters:
        table.add_row("gate", "", _count(estimate.gate_parameters), "", "", "")
    return table


def _work(estimate: Estimate) -> Table:
    columns = ("phase", "trained", "steps", "pieces", "tokens/step", "padding", "responses", "FLOPs", "time")
    table = _table("work (pieces: forward passes of a device in a step)", *columns)
    for phase in estimate.phases:
        work = phase.work
        table.add_row(
            Text(phase.name),
            _count(phase.trained_parameters),
            f"{work.steps:,}",
            f"{work.pieces_per_step:.1f}",
            f"{work.columns_per_step:,.0f}",
            f"{work.padding:.0%}",
            f"{work.responses_per_step:,.0f}",
            f"{work.flops:.2e}",
            _hours(work.hours),
        )
    return table


def _memory(estimate: Estimate) -> Table:
    title = "memory of one device at its peak"
    table = _table(title, "phase", "when", "part", "bytes", left=3)
    for phase in estimate.phases:
        parts = {**phase.memory.parts, "not for tensors": phase.overhead_bytes}
        rows = [(name, count) for name, count in parts.items() if count]
        for number, (name, count) in enumerate(rows):
            first = (phase.name, phase.memory.moment) if number == 0 else ("", "")
            table.add_row(*(Text(cell) for cell in first), name, gib(count))
        mark = "fits" if phase.fits else "does not fit"
        total = Text(gib(phase.needed_bytes), style="green" if phase.fits else "bold red")
        table.add_row("", Text(mark, style="green" if phase.fits else "bold red"), Text("in all", style="bold"), total)
        if phase.memory.host_bytes:
            table.add_row("", "", "in the host's memory", gib(phase.memory.host_bytes))
        table.add_section()
    return table


def _disk(estimate: Estimate) -> str:
    disk = estimate.disk
    parts = [f"checkpoints {gib(sum(disk.checkpoints.values()) + disk.writing)}", f"model {gib(disk.model)}"]
    if disk.specialists:
        parts.append(f"tuned specialists {gib(disk.specialists)}")
    if disk.hidden_limit is not None:
        limit = gib(min(disk.hidden_states, disk.hidden_limit))
        parts.append(f"hidden states {limit} at once, {gib(disk.hidden_states)} if all are kept")
    return f"disk: {gib(disk.num_bytes)} at most ({', '.join(parts)}); {gib(estimate.free_disk_bytes)} are free"


def _refusal(estimate: Estimate, phase: PhaseEstimate) -> str:
    over = phase.needed_bytes - estimate.devices.memory_bytes
    remedies = "; ".join(phase.remedies)
    advice = f"any one of these makes it fit: {remedies}" if remedies else "no setting tried makes it fit"
    return f"{phase.name} is {gib(over)} over what a device holds; {advice}"


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", no_wrap=True)
    return table


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:,.2f}{unit}"
    return f"{number:,}"


def _hours(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.0f} min" if hours * 60 >= 1 else f"{hours * 3600:.1f} s"
