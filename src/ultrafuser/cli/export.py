"""`ultrafuser export`: a model made ready for another engine, and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of a fused model.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write; a fused model there is replaced.")],
    engine: Annotated[Literal["vllm"], typer.Option("--for", help="The engine that will read it.")],
    template: Annotated[
        str, typer.Option(help="What all specialists will read: a name, tokenizer, a .jinja file, or a specialist's.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="Measure the cost on this: a recipe's validation records, or a file of records."),
    ] = None,
    records: Annotated[int, typer.Option(help="Of each domain at most.", min=1)] = 64,
    gate_only: Annotated[bool, typer.Option("--gate-only", help="Refer to the specialists, do not copy them.")] = False,
    device: Annotated[str, typer.Option(help="Where to measure; empty takes an accelerator if there is one.")] = "",
) -> None:
    """Write a model whose specialists share one template, as vLLM needs it, and say what that costs.

    Example: ultrafuser export runs/demo/model runs/demo/vllm --for vllm --template ultralm --data runs/demo/recipe.yaml
    """
    del engine  # the only one
    from rich.console import Console
    from rich.table import Table

    from ultrafuser.export.records import held_out_conversations
    from ultrafuser.export.shared import measure_cost, save_shared, shared_template
    from ultrafuser.model.load import LoadOptions, load_model
    from ultrafuser.model.target import check_export_target
    from ultrafuser.vllm_plugin.checks import check_options

    check_export_target(output, model)
    held_out = held_out_conversations(data, per_domain=records) if data is not None else {}
    fused, tokenizer = load_model(model, LoadOptions(device=device))
    check_options(fused.config, gate_only=gate_only)
    shared = shared_template(fused, tokenizer, template)
    costs = list(measure_cost(fused, tokenizer, shared, held_out))
    folder = save_shared(fused, tokenizer, shared, output, costs=costs, gate_only=gate_only)
    if costs:
        table = Table(caption="nats per response token; change with its 95% interval over the same records")
        for column in ("domain", "records", "own templates", "shared", "change"):
            table.add_column(column, justify="left" if column == "domain" else "right")
        for cost in costs:
            change = f"{cost.change.value:+.4f} ({cost.change.low:+.4f} to {cost.change.high:+.4f})"
            loss = (f"{cost.own:.4f}", f"{cost.shared:.4f}")
            table.add_row(cost.domain, str(cost.num_conversations), *loss, change)
        Console().print(table)
    else:
        typer.echo("The cost was not measured: give --data, a recipe or a file of records.", err=True)
    typer.echo(f"{folder}: serve it with vllm serve {folder}")
