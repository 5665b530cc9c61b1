"""`ultrafuser evaluate`: models on benchmarks, with intervals and cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ultrafuser.cli.options import Sources, parse_sources
from ultrafuser.cli.progress import evaluation_bars, silence_other_bars
from ultrafuser.errors import ConfigError


def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="Folder, hub id or http://HOST/v1#MODEL; NAME=PLACE names it.")
    ],
    tasks: Annotated[
        str, typer.Option(metavar="NAMES", help="Tasks and groups (paper, cot, tiny), by comma.")
    ] = "tiny",
    folder: Annotated[Path, typer.Option(help="Gets journal, results and tables; a second run goes on.")] = Path(
        "runs/evaluation"
    ),
    data: Annotated[Path, typer.Option(help="Folder with the benchmarks' files.", envvar="ULTRAFUSER_DATA")] = Path(
        "data"
    ),
    source: Sources = [],  # noqa: B006  typer copies it
    task_folder: Annotated[
        Path | None, typer.Option(help="Further task files of lm-eval; code that they name is executed.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many questions of each task.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Questions in a batch, at most.", min=1)] = 16,
    specialists: Annotated[bool, typer.Option("--specialists", help="Each specialist alone, too.")] = False,
    samples: Annotated[int, typer.Option(help="Answers to each question of code tasks, for pass@k.", min=1)] = 1,
    temperature: Annotated[float, typer.Option(help="Of these answers; 0 is greedy.", min=0.0)] = 0.0,
    max_tokens: Annotated[
        int | None, typer.Option(help="No answer is longer, whatever its task allows.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of sampled answers.", min=0)] = 0,
    sandbox: Annotated[str, typer.Option(help="How model-written code is locked up.")] = "auto",
    accept_unsandboxed: Annotated[
        bool, typer.Option("--i-accept-running-model-code-unsandboxed", help="Needed by --sandbox none.")
    ] = False,
    judge: Annotated[str | None, typer.Option(metavar="URL#MODEL", help="Judge of AlpacaEval and MT-Bench.")] = None,
    template: Annotated[str, typer.Option(help="Chat template of models that are not fused.")] = "tokenizer",
    dtype: Annotated[str, typer.Option(help="Of the weights; empty keeps the folder's.")] = "",
    device: Annotated[str, typer.Option(help="Where to run; empty takes an accelerator if there is one.")] = "",
) -> None:
    """Evaluate models on benchmarks: intervals, paired differences, speed and memory; resumes what was stopped.

    Example: ultrafuser evaluate runs/demo/model --tasks gsm8k,humaneval --limit 100
    """
    silence_other_bars()
    try:
        from ultrafuser.evaluation import harness  # noqa: F401
    except ImportError as error:
        missing = (error.name or "more packages").partition(".")[0]
        raise ConfigError(f"evaluation needs {missing}: pip install 'ultrafuser[eval]'") from error
    from ultrafuser.evaluation.judges.client import parse_judge
    from ultrafuser.evaluation.models import parse_model
    from ultrafuser.evaluation.run import EvaluationOptions, evaluate_models
    from ultrafuser.evaluation.table import to_markdown
    from ultrafuser.model.load import LoadOptions

    options = EvaluationOptions(
        tasks=[name for name in tasks.split(",") if name],
        folder=folder,
        data=data,
        places=parse_sources(source),
        task_folder=task_folder,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        num_samples=samples,
        temperature=temperature,
        max_tokens=max_tokens,
        specialists=specialists,
        sandbox=sandbox,
        accept_unsandboxed=accept_unsandboxed,
        judge=parse_judge(judge) if judge else None,
        load=LoadOptions(template, dtype, device),
    )
    named = [parse_model(model) for model in models]
    if len({name for name, _ in named}) < len(named):
        raise ConfigError("two models have the same name: name them with NAME=PLACE")
    with evaluation_bars() as watch:
        results = evaluate_models(dict(named), options, watch=watch)
    print(to_markdown(results))
