"""The comparison from end to end: make each model, examine it, keep its row, write the table.

A row that is on disk is not made again, so a stopped comparison goes on where it was.
"""

from __future__ import annotations

import gc
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.nn import Parameter
from transformers.utils import logging as transformers_logging

from ultrafuser.chat.messages import Conversation
from ultrafuser.compare.comparison import Comparison, Row, read_row, write_row
from ultrafuser.compare.examiner import BenchmarkExaminer, DemoExaminer, Examiner, HeldOutExaminer, share
from ultrafuser.compare.ingredients import check_ingredients
from ultrafuser.compare.table import COST_COLUMNS, markdown_table
from ultrafuser.compare.workshop import Plan, Workshop
from ultrafuser.config.recipe import Recipe
from ultrafuser.errors import ConfigError, ModelError
from ultrafuser.evaluation.run import Watch
from ultrafuser.files import write_text_atomically
from ultrafuser.generation import Generator, SamplingParams
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.memory import peak_bytes, reset_peak
from ultrafuser.provenance import hardware, versions

TIMED_TOKENS = 32


def compare(
    recipe: Recipe,
    *,
    exam: str = "held-out",
    limit: int = 200,
    only: Sequence[str] = (),
    tasks: Sequence[str] = (),
    data: Path | None = None,
    places: Mapping[str, str] | None = None,
    max_tokens: int | None = None,
    reward_model: str | None = None,
    ask_judge: Callable[[Sequence[str]], list[str]] | None = None,
    judge_name: str = "a judge",
    watch: Watch | None = None,
) -> Comparison:
    """Make, train and examine every baseline of a recipe; returns all rows and writes them to `<folder>/compare/`.

    Args:
        recipe: With specialists, data and both stages.
        exam: "held-out" records of the recipe's data, the "demo" exam, or "benchmarks".
        limit: Records or questions per domain.
        only: Names of rows, or their first part ("further-tuned"); empty: all.
        tasks: Names of tasks and groups, for "benchmarks".
        data: Folder with the benchmarks' files.
        places: Benchmark to file, folder or hub id, where it is not in `data`.
        max_tokens: No answer to a benchmark is longer, whatever its task allows.
        reward_model: Folder or hub id of a reward model, for selection among the specialists' answers.
        ask_judge: Prompts to replies of a judge, for the same.
        judge_name: Who that is; another judge gets a new row.
        watch: Told of progress in benchmarks.

    Raises:
        ConfigError: The recipe has nothing to compare, a name of `only` is unknown, or the folder holds a comparison
            of other ingredients.
        DataError: A benchmark is missing.
    """
    workshop = Workshop(recipe, reward_model=reward_model, ask_judge=ask_judge, judge_name=judge_name)
    examiner = _examiner(workshop, exam, limit, tasks, data, places or {}, max_tokens, watch)
    transformers_logging.disable_progress_bar()  # dozens of small models are loaded
    console = Console(stderr=True, highlight=False)
    plans = list(workshop.plans())
    wanted = _chosen([plan.name for plan in plans], only)
    check_ingredients(workshop.folder, workshop.ingredients, workshop.trainer.dataset)
    folder = workshop.folder / "rows" / _fingerprint(recipe, exam, limit, *tasks, *examiner.facts)
    rows = []
    for number, plan in enumerate(plans, start=1):
        if plan.name not in wanted:
            continue
        path = folder / f"{plan.name.replace(':', '-')}.json"
        # What a row says of its making names the chooser, which is not in the recipe.
        if not path.is_file() or read_row(path).what != plan.what:
            console.print(f"[bold]{number} of {len(plans)}: {plan.name}[/bold], {plan.what}")
            write_row(_row(plan, workshop, examiner), path)
        rows.append(read_row(path))
    rows += list(_selected(rows))
    comparison = Comparison(
        name=recipe.name,
        seed=recipe.seed,
        exam=examiner.name,
        recipe=recipe.model_dump(mode="json"),
        versions=versions(),
        hardware=hardware(),
        rows=rows,
    )
    write_text_atomically(comparison.model_dump_json(indent=1), workshop.folder / "comparison.json")
    write_text_atomically(markdown_table(comparison), workshop.folder / "comparison.md")
    return comparison


def _row(plan: Plan, workshop: Workshop, examiner: Examiner) -> Row:
    """Make and examine one model. What cannot be made for this recipe is a row that says why."""
    try:
        made = plan.make()
        marks, correct = (examiner.examine if made.has_distribution else examiner.examine_answers)(
            made.generator, plan.name
        )
    except (ConfigError, ModelError) as error:
        return Row(name=plan.name, what=plan.what, skipped=str(error))
    served, device = _served(made.model), made.model.device
    reset_peak(device)
    ms_per_token = _time_tokens(made.generator, examiner.questions())
    row = Row(
        name=plan.name,
        what=plan.what,
        marks=marks,
        correct=correct,
        parameters_trained=sum(p.numel() for p in served if p.requires_grad) if made.phases else 0,
        parameters_served=sum(p.numel() for p in served),
        weights_bytes=sum(p.numel() * p.element_size() for p in served),
        peak_bytes=peak_bytes(device),
        train_s=workshop.train_seconds(made.phases),
        ms_per_token=ms_per_token,
    )
    del made
    gc.collect()
    return row


def _served(model: FusedForCausalLM) -> list[Parameter]:
    """Parameters that an answer needs: a gate that decides nothing is not among them."""
    gated = len(model.names) > 1 and model.config.weighting == "gate"
    return [p for name, p in model.named_parameters() if gated or not name.startswith("fusion_gate.")]


def _time_tokens(generator: Generator, questions: Sequence[Conversation]) -> float:
    """Median milliseconds per token over the questions, each answered alone; the first warms up and is not counted."""
    times = []
    for question in (questions[0], *questions):
        began = time.perf_counter()
        (completion,) = generator.generate([question], SamplingParams(max_tokens=TIMED_TOKENS))
        times.append(1000 * (time.perf_counter() - began) / (len(completion.token_ids) + 1))  # with the end token
    return statistics.median(times[1:])


def _selected(rows: Sequence[Row]) -> list[Row]:
    """Rows that choose among the specialists' answers: the best per domain, at random, and by an oracle."""
    specialists = [row for row in rows if row.name.startswith("specialist:") and row.skipped is None]
    if len(specialists) < 2:
        return []
    domains = list(specialists[0].marks)
    best = {d: min((row.marks[d] for row in specialists), key=_badness) for d in domains}
    selected = [Row(name="best specialist", what="chosen for each domain with hindsight", marks=best)]
    if specialists[0].correct:
        # Where given answers are scored, nobody chooses among written ones.
        answers = {d: list(zip(*(row.correct[d] for row in specialists), strict=True)) for d in specialists[0].correct}
        oracle = {d: [any(right) for right in items] for d, items in answers.items()}
        random = {d: share(sum(map(sum, items)) / len(specialists), len(items)) for d, items in answers.items()}
        selected += [
            Row(name="selected:random", what="one of the specialists' answers, expected", marks=random),
            Row(
                name="selected:oracle",
                what="a right one of the specialists' answers, if any is: the bound of all selection",
                marks={d: share(sum(right), len(right)) for d, right in oracle.items()},
                correct=oracle,
            ),
        ]
    return selected


def _badness(mark: Mapping[str, float | int | None]) -> float:
    """The loss, or where there is none the share of wrong answers."""
    loss, accuracy = mark.get("loss"), mark.get("accuracy")
    return loss if loss is not None else 1.0 - (accuracy or 0.0)


def _examiner(
    workshop: Workshop,
    exam: str,
    limit: int,
    tasks: Sequence[str],
    data: Path | None,
    places: Mapping[str, str],
    max_tokens: int | None,
    watch: Watch | None,
) -> Examiner:
    makers: Mapping[str, Callable[[], Examiner]] = {
        "held-out": lambda: HeldOutExaminer(workshop.trainer.dataset, limit=limit),
        "demo": lambda: DemoExaminer(
            list(workshop.trainer.data.domains), items_per_domain=limit, seed=workshop.recipe.seed
        ),
        "benchmarks": lambda: BenchmarkExaminer(
            tasks or ["paper"],
            workshop.folder / "evaluation",
            data=data,
            places=places,
            limit=limit,
            max_tokens=max_tokens,
            questions=HeldOutExaminer(workshop.trainer.dataset, limit=2).questions(),
            watch=watch,
        ),
    }
    if exam not in makers:
        raise ConfigError(f"unknown exam {exam!r}: choose {', '.join(makers)}")
    return makers[exam]()


def _chosen(names: Sequence[str], only: Sequence[str]) -> set[str]:
    chosen = {name for name in names for wish in only if wish in (name, name.split(":")[0])}
    if unknown := [wish for wish in only if not any(wish in (name, name.split(":")[0]) for name in names)]:
        raise ConfigError(f"no model {unknown[0]!r} in the comparison; it has {', '.join(names)}")
    return chosen if only else set(names)


def _fingerprint(recipe: Recipe, *exam: str | int) -> str:
    settings = [recipe.model_dump(mode="json"), *exam]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def print_comparison(comparison: Comparison, folder: Path) -> None:
    """Show the table in the terminal, in two parts that fit its width: what models are worth, and what they cost."""
    lines = markdown_table(comparison).splitlines()
    header, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    num_marks = len(header) - len(COST_COLUMNS)
    console = Console(highlight=False)
    for title, columns in (("worth", range(1, num_marks)), ("cost", range(num_marks, len(header)))):
        table = Table(title=f"{comparison.name}: {title}", box=box.SIMPLE, pad_edge=False)
        table.add_column("model", no_wrap=True)
        for column in columns:
            table.add_column(header[column], justify="right")
        for cells in body:
            table.add_row(cells[0], *(Text(cells[c].replace("**", ""), "bold" * ("**" in cells[c])) for c in columns))
        console.print(table)
    console.print(f"In {folder}: comparison.json, comparison.md")
