"""`ultrafuser bench`: how fast a model decodes here, and what reduced weights lose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ultrafuser.engine.bench import DecodeTiming

QUESTIONS = (
    "Why do leaves change their colour in autumn? Explain it to a child.",
    "Write a Python function that returns the longest common prefix of a list of strings.",
    "A shop sells pens at 3 for 2 euros. How much do 24 pens cost? Explain each step.",
)


def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id: fused, gate-only, or one model.")],
    tokens: Annotated[int, typer.Option(help="Tokens of every answer.", min=2)] = 48,
    batch: Annotated[
        list[int], typer.Option("--batch", help="Choices that run at once; give it several times.", min=1)
    ] = [1, 4, 16],  # noqa: B006  typer copies it
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers here, too.")] = None,
    template: Annotated[str, typer.Option(help="Chat template of a model that is not fused.")] = "tokenizer",
    dtype: Annotated[str, typer.Option(help="Of the weights; empty keeps the folder's.")] = "",
    device: Annotated[str, typer.Option(help="Where to run; empty takes an accelerator if there is one.")] = "",
) -> None:
    """Measure decoding: runners, weights, drafts and batches, beside the speed at which memory is read.

    Example: ultrafuser bench runs/demo/model
    """
    import json

    from rich.console import Console
    from rich.table import Table

    from ultrafuser.engine.bench import as_rows, bench_model, read_bandwidth
    from ultrafuser.engine.few_rows import why_missing
    from ultrafuser.files import write_text_atomically
    from ultrafuser.model.load import LoadOptions

    console = Console(stderr=True)
    ceiling = read_bandwidth()
    timings: list[DecodeTiming] = []
    for timing in bench_model(
        model, QUESTIONS, batches=batch, max_tokens=tokens, load=LoadOptions(template, dtype, device)
    ):
        timings.append(timing)
        console.print(f"{timing.name}, {timing.batch} at once: {timing.ms_per_token:.1f} ms/token", highlight=False)
    reason = why_missing()
    kernel = f"torch's kernels: {reason}" if reason else "our own kernels for few rows"
    table = Table(
        caption=f"memory is read at {ceiling:.1f} GB/s; {kernel}; quality: nats per token more than exact weights"
    )
    for column in ("engine", "at once", "ms/token", "tokens/s", "tokens/pass", "GB/s", "of ceiling", "quality"):
        table.add_column(column, justify="left" if column == "engine" else "right", no_wrap=column == "engine")
    for t in timings:
        rate = (f"{t.bandwidth:.1f}", f"{t.bandwidth / ceiling:.0%}") if t.bandwidth and t.batch == 1 else ("", "")
        loss = "" if t.extra_loss is None else f"{t.extra_loss:+.4f}"
        row = (f"{t.ms_per_token:.1f}", f"{t.tokens_per_s:.1f}", f"{t.tokens_per_pass:.2f}")
        table.add_row(t.name, str(t.batch), *row, *rate, loss)
    Console().print(table)
    if json_file is not None:
        report = {"model": model, "read_bandwidth_gb_per_s": ceiling, "kernels": kernel, "timings": as_rows(timings)}
        write_text_atomically(json.dumps(report, indent=1) + "\n", json_file)
