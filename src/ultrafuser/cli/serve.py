"""`ultrafuser serve`: a model behind an OpenAI-compatible API, with a chat page."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from ultrafuser.errors import ConfigError

NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id: fused, gate-only, or one model.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    api_keys: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keys, one a line; without it the variable ULTRAFUSER_API_KEYS, if set."),
    ] = None,
    without_keys: Annotated[
        bool, typer.Option("--without-keys", help="Let everybody in, also where others can reach the server.")
    ] = False,
    name: Annotated[str, typer.Option(help="What clients call the model; empty takes it from the folder.")] = "",
    allowed_host: Annotated[
        list[str], typer.Option(metavar="NAME", help="A name by which clients call this server.")
    ] = [],  # noqa: B006  typer copies it
    max_running: Annotated[int, typer.Option(help="Answers written at once, memory permitting.", min=1)] = 16,
    max_waiting: Annotated[int, typer.Option(help="Answers in the queue; more get 503.", min=1)] = 256,
    max_context: Annotated[
        int, typer.Option(help="Tokens of prompt and answer; 0 takes the model's, 4096 at most.", min=0)
    ] = 0,
    weights: Annotated[
        Literal["exact", "half", "int8"], typer.Option(help="Format of the weights; half and int8 are for CPUs.")
    ] = "exact",
    drafts: Annotated[str, typer.Option(help="Kinds of speculation by comma: lookup, self; or none.")] = "lookup,self",
    draft_weights: Annotated[
        Literal["auto", "exact", "half", "int8", "int4"],
        typer.Option(help="Of the copy that runs ahead for self; exact makes none. Changes no token."),
    ] = "auto",
    pack: Annotated[
        bool | None,
        typer.Option("--pack/--no-pack", help="A second layout of fp32 weights, faster for prompts; else if it fits."),
    ] = None,
    parallel: Annotated[
        bool,
        typer.Option("--parallel", help="One process for each specialist: see docs/serve.md for how to start them."),
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Longest answer; 0 takes the context.", min=0)] = 0,
    requests_per_minute: Annotated[int, typer.Option(help="Of one key; 0: any number.", min=0)] = 0,
    requests_at_once: Annotated[int, typer.Option(help="Of one key; 0: any number.", min=0)] = 0,
    answer_s: Annotated[float, typer.Option(help="Longest time for an answer, in seconds.", min=0.1)] = 600.0,
    drain_s: Annotated[float, typer.Option(help="Seconds to finish answers when told to stop.", min=1.0)] = 20.0,
    template: Annotated[str, typer.Option(help="Chat template of a model that is not fused.")] = "tokenizer",
    dtype: Annotated[str, typer.Option(help="Of the weights; empty keeps the folder's.")] = "",
    device: Annotated[str, typer.Option(help="Where to run; empty takes an accelerator if there is one.")] = "",
) -> None:
    """Serve a model: an OpenAI-compatible API under /v1, a chat page at /.

    The first SIGTERM or Ctrl-C finishes what runs, the second one does not.

    Example: ultrafuser serve runs/demo/model --port 8000
    """
    if missing := [package for package in NEEDED if find_spec(package) is None]:
        raise ConfigError(f"serving needs {', '.join(missing)}: pip install 'ultrafuser[server]'")
    from ultrafuser.server.process import ServeOptions, serve
    from ultrafuser.server.settings import Deadlines, Limits

    limits = Limits(
        max_tokens=max_tokens or None, requests_per_minute=requests_per_minute, requests_at_once=requests_at_once
    )
    options = ServeOptions(
        model,
        host=host,
        port=port,
        key_file=api_keys,
        without_keys=without_keys,
        name=name,
        allowed_hosts=tuple(allowed_host),
        max_running=max_running,
        max_waiting=max_waiting,
        max_context=max_context,
        weights=weights,
        draft_weights=draft_weights,
        pack=pack,
        parallel=parallel,
        drafts=tuple(kind for kind in drafts.split(",") if kind not in ("", "none")),
        template=template,
        dtype=dtype,
        device=device,
        limits=limits,
        deadlines=Deadlines(total_s=answer_s, drain_s=drain_s),
    )
    raise typer.Exit(serve(options))
