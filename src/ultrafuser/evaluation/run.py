"""Models x tasks: every answer into the journal, every verdict into `results.json`.

A run that was killed goes on where it was: answers come from the journal and are graded anew, which costs nothing but
the time of grading.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ultrafuser.errors import ConfigError
from ultrafuser.evaluation.benchmarks import EMBEDDED, JUDGED_WITH, describe_source, find_place, read_docs
from ultrafuser.evaluation.catalog import TASKS, TaskInfo, choose_tasks
from ultrafuser.evaluation.journal import Entry, Journal
from ultrafuser.evaluation.models import (
    answering_alone,
    is_endpoint,
    load_generator,
    model_digest,
    specialist_names,
    weights_digest,
)
from ultrafuser.evaluation.results import (
    EvaluationResults,
    ItemResult,
    ModelSource,
    TaskScore,
    TaskSource,
    aggregate,
    compare,
    write_results,
)
from ultrafuser.evaluation.table import write_tables
from ultrafuser.generation import Generator
from ultrafuser.model.load import LoadOptions

if TYPE_CHECKING:
    from ultrafuser.evaluation.judges.client import JudgeOptions
    from ultrafuser.evaluation.lm import GeneratorLM

RESULTS_FILE = "results.json"
JOURNAL_FILE = "journal.jsonl"
DEFAULT_LOAD = LoadOptions()
LENGTH_METRIC = "length_delta"


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate on, and how.

    Attributes:
        tasks: Names of tasks and groups.
        folder: Gets the journal, `results.json` and the tables.
        data: Folder with the benchmarks' files.
        places: Benchmark to file, folder or hub id, where it is not in `data`.
        task_folder: Further task files of lm-eval; what they name is executed.
        limit: Only the first so many questions of each task.
        batch_size: Questions in a batch, at most; the journal is flushed after each.
        seed: Of sampled answers.
        num_samples: Answers to each question of a code task, for pass@k.
        temperature: Of these answers; more than one sample needs it above 0.
        max_tokens: No answer is longer, whatever its task allows.
        specialists: Evaluate each specialist of a fused model alone, too.
        sandbox: How model-written code is locked up; see `ultrafuser.sandbox`.
        judge: Who judges; needed by AlpacaEval and MT-Bench.
        accept_unsandboxed: Has to be said for the sandbox "none".
        load: How models are loaded.
    """

    tasks: Sequence[str]
    folder: Path
    data: Path | None = None
    places: Mapping[str, str] = field(default_factory=dict)
    task_folder: Path | None = None
    limit: int | None = None
    batch_size: int = 16
    seed: int = 0
    num_samples: int = 1
    temperature: float = 0.0
    max_tokens: int | None = None
    specialists: bool = False
    sandbox: str = "auto"
    accept_unsandboxed: bool = False
    judge: JudgeOptions | None = None
    load: LoadOptions = DEFAULT_LOAD

    def __post_init__(self) -> None:
        if self.num_samples > 1 and self.temperature <= 0:
            raise ConfigError(f"{self.num_samples} samples need a temperature above 0, or all would be the same")
        for name, value in (("limit", self.limit), ("max_tokens", self.max_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}: it must be at least 1")


class Watch(Protocol):
    """Told how far the evaluation is: `done` of `total` questions of a task."""

    def __call__(self, model: str, task: str, done: int, total: int) -> None:
        """Called after every batch."""
        ...


def evaluate_models(
    models: Mapping[str, Generator | str],
    options: EvaluationOptions,
    *,
    watch: Watch | None = None,
) -> EvaluationResults:
    """Evaluate models on tasks; results are written after each.

    Args:
        models: By name: a Generator, or a place to load one from when its turn comes.
        options: What to evaluate on.
        watch: Told of progress.

    Raises:
        ConfigError: An unknown task, a wrong task file, or something that is not installed.
        DataError: Data are missing or damaged, or the journal is in use.
        ModelError: A model cannot be loaded, gives no numbers, or its endpoint fails. What was answered is kept.
    """
    if not models:
        raise ConfigError("name at least one model")
    plan = _Plan(options)
    plan.check_models(models)
    sources: dict[str, ModelSource] = {}
    scores: list[TaskScore] = []
    items: list[ItemResult] = []
    results = plan.results(sources, scores, items)
    with Journal(options.folder / JOURNAL_FILE) as journal:
        for given, model in models.items():
            loaded = load_generator(model, options.load) if isinstance(model, str) else model
            place = model if isinstance(model, str) else type(model).__name__
            weights = weights_digest(loaded)
            alone = specialist_names(loaded) if options.specialists else []
            for name, solo in [(given, None), *((f"{given}:{each}", each) for each in alone)]:
                with answering_alone(loaded, solo) as generator:
                    sources[name] = ModelSource(place=place, digest=model_digest(generator, weights))
                    for task in plan.tasks:
                        score, found = plan.run(task, name, generator, sources[name].digest, journal, watch)
                        scores.append(score)
                        items += found
                        results = plan.results(sources, scores, items)
                        write_results(results, options.folder / RESULTS_FILE)
                        write_tables(results, options.folder)
    return results


class _Plan:
    """What is to be done, checked before any model is loaded."""

    def __init__(self, options: EvaluationOptions) -> None:
        from ultrafuser.evaluation.harness import own_tasks, quiet_lm_eval

        quiet_lm_eval()
        self.options = options
        self.tasks = choose_tasks(options.tasks, own_tasks(options.task_folder))
        self.places: dict[str, str] = {}
        self.sources = {task: self._source(task) for task in self.tasks}
        kinds = {TASKS[task].kind for task in self.tasks if task in TASKS}
        if "code" in kinds:
            from ultrafuser.evaluation.grading.code import use_sandbox

            use_sandbox(options.sandbox, accept_unsandboxed=options.accept_unsandboxed)
        if "judge" in kinds and options.judge is None:
            raise ConfigError("AlpacaEval and MT-Bench need a judge: --judge http://HOST/v1#MODEL")

    def check_models(self, models: Mapping[str, Generator | str]) -> None:
        """Refuse an endpoint that is to score given answers, before others have taken hours."""
        scoring = [task for task in self.tasks if task in TASKS and TASKS[task].kind == "scores"]
        remote = [name for name, model in models.items() if isinstance(model, str) and is_endpoint(model)]
        if scoring and remote:
            raise ConfigError(
                f"{', '.join(remote)} cannot score given answers, which {', '.join(scoring)} needs: an endpoint shows "
                "what it writes and no more. truthfulqa_answer asks for the answer in words."
            )

    def _source(self, task: str) -> TaskSource:
        info = TASKS.get(task)
        if info is None:
            return TaskSource(place=str(self.options.task_folder), digest="", num_questions=0, headline="")
        place = EMBEDDED if info.embedded else find_place(info.benchmark, self.options.data, self.options.places)
        if not info.embedded:
            self.places[info.benchmark] = place
        for other in JUDGED_WITH.get(task, ()):
            self.places[other] = find_place(other, self.options.data, self.options.places)
        source = describe_source(place, read_docs(info.benchmark, place, self.options.limit))
        return TaskSource(
            place=source.place, digest=source.digest, num_questions=source.num_questions, headline=info.headline
        )

    def run(
        self, task: str, model: str, generator: Generator, digest: str, journal: Journal, watch: Watch | None
    ) -> tuple[TaskScore, list[ItemResult]]:
        """One model on one task."""

        def tell(done: int, total: int) -> None:
            if watch is not None:
                watch(model, task, done, total)

        info = TASKS.get(task)
        if info is not None and info.kind == "judge":
            items, entries = self._judge(task, model, generator, digest, journal, tell)
        else:
            items, entries = self._ask(task, info, model, generator, digest, journal, tell)
        return score_of(task, model, items, entries), items

    def _ask(
        self,
        task: str,
        info: TaskInfo | None,
        model: str,
        generator: Generator,
        digest: str,
        journal: Journal,
        tell: Callable[[int, int], None],
    ) -> tuple[list[ItemResult], list[Entry]]:
        from ultrafuser.evaluation.harness import load_task, run_task

        options = self.options
        sampled = info is not None and info.kind == "code"
        loaded = load_task(
            task,
            places=self.places,
            limit=options.limit,
            folder=options.task_folder,
            num_samples=options.num_samples if sampled else None,
            temperature=options.temperature if sampled else 0.0,
        )
        lm = self._lm(generator, digest, journal, tell)
        items = run_task(lm, loaded, model=model, limit=options.limit)
        return items, lm.entries(task)

    def _judge(
        self,
        task: str,
        model: str,
        generator: Generator,
        digest: str,
        journal: Journal,
        tell: Callable[[int, int], None],
    ) -> tuple[list[ItemResult], list[Entry]]:
        from ultrafuser.evaluation.judges.client import Judge
        from ultrafuser.evaluation.judges.run import judge_task

        assert self.options.judge is not None
        lm = self._lm(generator, digest, journal, tell)
        docs = read_docs(TASKS[task].benchmark, self.places[TASKS[task].benchmark], self.options.limit)
        others = {name: read_docs(name, self.places[name]) for name in JUDGED_WITH[task]}
        items = judge_task(task, docs, others, lm, Judge(self.options.judge, journal), model=model)
        return items, lm.entries(task)

    def _lm(self, generator: Generator, digest: str, journal: Journal, tell: Callable[[int, int], None]) -> GeneratorLM:
        from ultrafuser.evaluation.lm import GeneratorLM

        options = self.options
        return GeneratorLM(
            generator,
            digest=digest,
            journal=journal,
            batch_size=options.batch_size,
            seed=options.seed,
            max_tokens=options.max_tokens,
            progress=tell,
        )

    def results(
        self, models: Mapping[str, ModelSource], scores: Sequence[TaskScore], items: Sequence[ItemResult]
    ) -> EvaluationResults:
        """All that is known so far."""
        from ultrafuser.provenance import hardware, versions

        options = self.options
        headlines = {task: source.headline for task, source in self.sources.items() if source.headline}
        return EvaluationResults(
            models=dict(models),
            tasks=self.sources,
            options={
                "limit": options.limit,
                "seed": options.seed,
                "num_samples": options.num_samples,
                "temperature": options.temperature,
                "max_tokens": options.max_tokens,
                "sandbox": options.sandbox,
                "judge": options.judge.model if options.judge is not None else None,
            },
            versions=versions() | {name: _version(name) for name in ("lm-eval", "math-verify")},
            hardware=hardware(),
            scores=list(scores),
            differences=compare(items, list(models), headlines),
            items=list(items),
            notes=self._notes(),
        )

    def _notes(self) -> list[str]:
        notes = []
        if self.options.limit is not None:
            notes.append(f"Only the first {self.options.limit} questions of each task were asked.")
        if self.options.max_tokens is not None:
            notes.append(f"No answer was longer than {self.options.max_tokens} tokens.")
        if self.options.sandbox == "none":
            notes.append("Model-written code ran without a sandbox: these results prove nothing against cheating.")
        if any(TASKS[task].embedded for task in self.tasks if task in TASKS):
            notes.append("The tiny tasks show that evaluation works; they measure no ability worth reporting.")
        return notes


def score_of(task: str, model: str, items: Sequence[ItemResult], entries: Sequence[Entry]) -> TaskScore:
    """Aggregates and costs of one model on one task, from its items and the answers in the journal."""
    metrics = aggregate(items)
    if LENGTH_METRIC in metrics and "win_rate" in metrics:
        from ultrafuser.evaluation.judges.length import length_controlled

        metrics["lc_win_rate"] = length_controlled(items)
    tokens = sum(int(entry["tokens"]) for entry in entries)
    seconds = sum(float(entry["seconds"]) for entry in entries)
    return TaskScore(
        model=model,
        task=task,
        metrics=metrics,
        outcomes=dict(Counter(part for item in items for part in item.outcome.split(",") if part)),
        num_items=len(items),
        num_cut=sum(entry.get("finish") == "length" for entry in entries),
        tokens=tokens,
        seconds=seconds,
        tokens_per_s=tokens / seconds if seconds > 0 else None,
        peak_memory_bytes=max((int(entry.get("memory_bytes", 0)) for entry in entries), default=0),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
