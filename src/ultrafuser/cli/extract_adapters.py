"""`ultrafuser extract-adapters` and `ultrafuser merge-adapters`: fine-tunes as base and adapters, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ultrafuser.export.adapters import QualityLoss
    from ultrafuser.model.extraction import Extract


def extract_adapters(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or hub id of the model all were made from.")],
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="A fused model, or fine-tunes as NAME=FOLDER.")],
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder to write; what an earlier call wrote there is replaced.")
    ],
    energy: Annotated[
        float, typer.Option(help="Keep this part of the differences' energy, as far as --share allows.")
    ] = 1.0,
    share: Annotated[
        float, typer.Option(help="The most parameters of all adapters together, as a part of the base's.")
    ] = 0.15,
    max_rank: Annotated[int, typer.Option(help="The largest rank of a layer.", min=1)] = 64,
    data: Annotated[
        Path | None,
        typer.Option(help="Measure the loss of quality on this: a recipe's validation records, or a file of records."),
    ] = None,
    records: Annotated[int, typer.Option(help="Of each domain at most.", min=1)] = 64,
    template: Annotated[str, typer.Option(help="Of the fine-tunes, to measure them in; a fused model has its own.")] = (
        "tokenizer"
    ),
) -> None:
    """Turn full fine-tunes of one base into the base and a low-rank adapter each, and say what that costs.

    A fused model becomes one whose specialists share the base: the weights of one model in memory instead of n.

    Example: ultrafuser extract-adapters runs/smollm2/base runs/smollm2/model --out runs/shared
    """
    from dataclasses import replace

    from ultrafuser.errors import ConfigError
    from ultrafuser.export.adapters import check_fused_family, extract_fused, extract_specialists, measure_quality
    from ultrafuser.export.records import held_out_conversations
    from ultrafuser.model.checkpoint import save_fused
    from ultrafuser.model.fused import FusedForCausalLM
    from ultrafuser.model.load import LoadOptions, load_model
    from ultrafuser.model.target import check_export_target

    named = dict(model.split("=", 1) for model in models if "=" in model)
    if len(named) != len(models) and (named or len(models) > 1):
        raise ConfigError("give one fused model, or each fine-tune as NAME=FOLDER, with a name of its own")
    held_out = held_out_conversations(data, per_domain=records) if data is not None else {}
    quality: list[QualityLoss] = []
    if named:
        extracts = extract_specialists(base, named, out, max_rank=max_rank, energy=energy, share=share)
        for name, place in named.items() if held_out else ():
            before, tokenizer = load_model(place, LoadOptions(template=template, device="cpu"))
            after = FusedForCausalLM.from_specialists({"model": out / name}, templates=template, tokenizer=tokenizer)
            quality += [replace(loss, model=name) for loss in measure_quality(before, after, tokenizer, held_out)]
    else:
        check_export_target(out, models[0])
        check_fused_family(models[0], base)
        fused, tokenizer = load_model(models[0], LoadOptions(device="cpu"))
        shared, extracts = extract_fused(fused, base, max_rank=max_rank, energy=energy, share=share)
        quality = measure_quality(fused, shared, tokenizer, held_out)
        save_fused(shared, out, tokenizer=tokenizer, gate_only=True)
    _show(extracts, quality)
    if data is None:
        typer.echo("The loss of quality was not measured: give --data, a recipe or a file of records.", err=True)
    typer.echo(str(out))


def merge_adapters(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of a fused model with adapters.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to write; a model there is replaced.")],
) -> None:
    """Write a fused model with adapters as one of whole specialists, which needs nothing else on the disk.

    Example: ultrafuser merge-adapters runs/shared --out runs/merged
    """
    from ultrafuser.export.adapters import save_merged

    typer.echo(str(save_merged(model, out)))


def _show(extracts: Mapping[str, Extract], quality: Sequence[QualityLoss]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(caption="kept: of the energy of linear layers' changes; left out: changes that no adapter can carry")
    for column in ("specialist", "ranks", "parameters", "MB in bf16", "kept", "left out"):
        table.add_column(column, justify="left" if column == "specialist" else "right")
    for name, extract in extracts.items():
        ranks = sorted(extract.ranks.values())
        shown = f"{ranks[0]} to {ranks[-1]}, median {ranks[len(ranks) // 2]}"
        size = f"{2 * extract.num_parameters / 1e6:.1f}"
        table.add_row(name, shown, f"{extract.num_parameters:,}", size, f"{extract.kept:.1%}", f"{extract.lost:.2%}")
    Console().print(table)
    if quality:
        losses = Table(caption="nats per response token")
        for column in ("model", "domain", "before", "after", "change"):
            losses.add_column(column, justify="left" if column in ("model", "domain") else "right")
        for loss in quality:
            losses.add_row(loss.model, loss.domain, f"{loss.before:.4f}", f"{loss.after:.4f}", f"{loss.change:+.2%}")
        Console().print(losses)
