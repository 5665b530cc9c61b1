"""The `ultrafuser` command: registers the verbs, shows our errors as one line.

Exit codes: 0 done; 1 an error of ours (one line on stderr) or a check that failed; 2 wrong usage; 3 model-written
code cannot be run safely here; 130 interrupted, with the work saved.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from ultrafuser.cli import (
    bench,
    chat,
    compare,
    decontaminate,
    demo,
    doctor,
    evaluate,
    export,
    extract_adapters,
    inspect,
    prepare,
    serve,
    synthesize,
    train,
)
from ultrafuser.errors import UltrafuserError

app = typer.Typer(
    name="ultrafuser",
    help="Fuse several fine-tuned language models into one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def configure(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more about what is going on.")] = False,
) -> None:
    """Fuse several fine-tuned language models into one."""
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", handlers=[handler])


app.command()(train.train)
app.command()(prepare.prepare)
app.command()(decontaminate.decontaminate)
app.command()(doctor.doctor)
app.command()(evaluate.evaluate)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(export.export)
app.command()(extract_adapters.extract_adapters)
app.command()(extract_adapters.merge_adapters)
app.command()(bench.bench)
app.command()(demo.demo)
app.command()(compare.compare)
app.command()(inspect.inspect)
app.add_typer(synthesize.synthesize, name="synthesize")


def run() -> None:
    """Run the command line."""
    try:
        app()
    except UltrafuserError as error:
        if not (_is_another() if error.is_told is None else error.is_told):
            print(f"ultrafuser: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        if not _is_another():
            print("ultrafuser: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _is_another() -> bool:
    """Whether a launcher started this process beside another one that says the same."""
    return os.environ.get("LOCAL_RANK", "0") != "0"
