"""`ultrafuser chat`: talk to a fused model and see which specialist wrote which token."""

from __future__ import annotations

from contextlib import closing, suppress
from typing import Annotated

import typer


def chat(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or hub id of a model, or http://HOST:PORT of a server.")
    ],
    message: Annotated[str | None, typer.Option("--message", "-m", help="Ask this one question and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.", min=0.0)] = 0.0,
    solo: Annotated[str | None, typer.Option(help="Let one specialist answer alone.")] = None,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    single_turn: Annotated[
        bool, typer.Option("--single-turn", help="Forget what was said before each question.")
    ] = False,
) -> None:
    """Talk to a fused model; every token has the colour of the specialist that weighed most.

    `/help` lists what else one can do: let specialists speak alone, leave some out, see their answers side by side.

    Example: ultrafuser chat runs/demo/model -m "What is the capital of France?"
    """
    from rich.console import Console

    from ultrafuser.analysis.terminal import legend
    from ultrafuser.cli.answers import Voices, open_answers
    from ultrafuser.cli.talk import Talk
    from ultrafuser.errors import ModelError
    from ultrafuser.generation import SamplingParams

    with suppress(ImportError):
        import readline  # noqa: F401  lines can then be edited, and recalled

    with closing(open_answers(model)) as answers:
        if solo is not None and solo not in answers.names:
            raise ModelError(f"no specialist {solo!r} to answer alone; the model has {', '.join(answers.names)}")
        console = Console(highlight=False)
        console.print(legend(answers.names))
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
        talk = Talk(answers, params, voices=Voices(solo=solo), system=system, single_turn=single_turn, console=console)
        if message is None:
            talk.run()
        elif not talk.ask(message):
            raise typer.Exit(130)
