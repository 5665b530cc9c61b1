"""What models are compared on: the demo's exam, held-out records of the recipe, or benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ultrafuser.chat.messages import Conversation
from ultrafuser.data.dataset import Dataset
from ultrafuser.demo.exam import answer, make_exam, mark
from ultrafuser.demo.ingredients import conversation
from ultrafuser.errors import ConfigError
from ultrafuser.evaluation.benchmarks import EMBEDDED, describe_source, find_place, read_docs
from ultrafuser.evaluation.catalog import TASKS, choose_tasks
from ultrafuser.evaluation.intervals import wilson_interval
from ultrafuser.evaluation.losses import score_losses
from ultrafuser.evaluation.run import EvaluationOptions, Watch, evaluate_models
from ultrafuser.generation import Generator

LONGEST_ANSWER = 96  # tokens; the longest reference answers of the demo's exam have fewer

Marks = tuple[dict[str, dict[str, float | int | None]], dict[str, list[bool]]]


class Examiner(Protocol):
    """Marks a generator on every domain."""

    name: str
    facts: tuple[str | int, ...]  # what else its marks depend on, besides the recipe and the number of questions

    def examine(self, generator: Generator, name: str) -> Marks:
        """Marks and, where answers can be checked, which are right; `name` is shown with the progress."""
        ...

    def examine_answers(self, generator: Generator, name: str) -> Marks:
        """The same for a generator that answers but has no distribution to score.

        Raises:
            ConfigError: Answers cannot be checked here.
        """
        ...

    def questions(self) -> list[Conversation]:
        """A few questions of every domain, to time the answers of."""
        ...


class DemoExaminer:
    """Loss and accuracy on the test questions of the demo's world, mixed ones too."""

    name = "demo"
    facts: tuple[str | int, ...] = ()

    def __init__(self, domains: list[str], *, items_per_domain: int, seed: int) -> None:
        self.exam = make_exam(domains, items_per_domain=items_per_domain, seed=seed)

    def examine(self, generator: Generator, name: str) -> Marks:  # noqa: ARG002
        """Score the reference answers, grade the generator's own."""
        marks, correct = {}, {}
        for domain, items in self.exam.items():
            score, _, _, correct[domain] = mark(generator, items)
            marks[domain] = score.model_dump(exclude={"tokens"})
        return marks, correct

    def examine_answers(self, generator: Generator, name: str) -> Marks:  # noqa: ARG002
        """Grade the generator's answers."""
        correct = {
            domain: answer(generator, items, max_tokens=LONGEST_ANSWER)[1] for domain, items in self.exam.items()
        }
        return {domain: share(sum(right), len(right)) for domain, right in correct.items()}, correct

    def questions(self) -> list[Conversation]:
        """Two of every domain."""
        return [conversation(item)[:1] for items in self.exam.values() for item in items[:2]]


class HeldOutExaminer:
    """Response loss on the test split of the recipe's data (on validation where it has no test split)."""

    name = "held-out"
    facts: tuple[str | int, ...] = ()

    def __init__(self, dataset: Dataset, *, limit: int) -> None:
        split: Any = "test" if all(dataset["test"].get(domain) for domain in dataset["train"]) else "validation"
        self.records: Mapping[str, list[Conversation]] = {
            domain: [record.messages for record in records[:limit]] for domain, records in dataset[split].items()
        }
        if empty := [domain for domain, records in self.records.items() if not records]:
            raise ConfigError(f"no held-out records in {', '.join(empty)}: raise data.test_fraction")

    def examine(self, generator: Generator, name: str) -> Marks:  # noqa: ARG002
        """Score the responses of all records."""
        marks: dict[str, dict[str, float | int | None]] = {}
        for domain, records in self.records.items():
            loss = score_losses(generator, records).loss
            marks[domain] = {"loss": loss.value, "loss_low": loss.low, "loss_high": loss.high, "n": len(records)}
        return marks, {}

    def examine_answers(self, generator: Generator, name: str) -> Marks:  # noqa: ARG002
        """Nobody can check answers to held-out records."""
        raise ConfigError("held-out records say nothing about chosen answers: use an exam whose answers are checked")

    def questions(self) -> list[Conversation]:
        """Two of every domain: a record up to its first answer."""
        cut = [
            next(record[:i] for i, message in enumerate(record) if message.role == "assistant")
            for records in self.records.values()
            for record in records[:2]
        ]
        return [question for question in cut if question]


class BenchmarkExaminer:
    """Tasks of `ultrafuser evaluate`; each task takes the place of a domain.

    Args:
        tasks: Names of tasks and groups; judged ones have no accuracy and are refused.
        folder: Gets the journal, so that no model answers twice.
        data: Folder with the benchmarks' files.
        places: Benchmark to file, folder or hub id, where it is not in `data`.
        limit: Questions of each task.
        max_tokens: No answer is longer, whatever its task allows.
        questions: What to time answers on.
        watch: Told of progress.

    Raises:
        ConfigError: A task is unknown or judged.
        DataError: The data of a task are missing or damaged: said before any model is made.
    """

    name = "benchmarks"

    def __init__(
        self,
        tasks: Sequence[str],
        folder: Path,
        *,
        data: Path | None,
        places: Mapping[str, str],
        limit: int,
        max_tokens: int | None = None,
        questions: list[Conversation],
        watch: Watch | None = None,
    ) -> None:
        self.tasks = choose_tasks(tasks)
        if judged := [task for task in self.tasks if TASKS[task].kind == "judge"]:
            raise ConfigError(f"{judged[0]} is judged, which has no accuracy: run `ultrafuser evaluate` on it")
        self.options = EvaluationOptions(
            tasks=self.tasks, folder=folder, data=data, places=places, limit=limit, max_tokens=max_tokens
        )
        self.asked, self.watch = questions, watch
        digests = [_digest(task, data, places, limit) for task in self.tasks]
        self.facts: tuple[str | int, ...] = (*digests, *([max_tokens] if max_tokens is not None else []))

    def examine(self, generator: Generator, name: str) -> Marks:
        """Headline metric of each task, and which answers are right where answers are written."""
        results = evaluate_models({name: generator}, self.options, watch=self.watch)
        marks: dict[str, dict[str, float | int | None]] = {}
        for score in results.scores:
            headline = score.metrics[TASKS[score.task].headline]
            marks[score.task] = {
                "loss": None,
                "accuracy": headline.value,
                "accuracy_low": headline.low,
                "accuracy_high": headline.high,
                "n": headline.n,
            }
        correct = {}
        for task in self.tasks:
            items = [item for item in results.items if item.task == task]
            # An item of several judgements, as in truthfulqa_answer, is neither right nor wrong.
            if TASKS[task].kind != "scores" and not any(item.weights for item in items):
                correct[task] = [item.values[TASKS[task].headline] == 1.0 for item in items]
        return marks, correct

    def examine_answers(self, generator: Generator, name: str) -> Marks:
        """The same, where no task scores given answers."""
        if scored := [task for task in self.tasks if TASKS[task].kind == "scores"]:
            raise ConfigError(f"{scored[0]} scores given answers, which chosen answers cannot be")
        return self.examine(generator, name)

    def questions(self) -> list[Conversation]:
        """What was given to time answers on."""
        return self.asked


def _digest(task: str, data: Path | None, places: Mapping[str, str], limit: int) -> str:
    """The hash of the questions of a task."""
    info = TASKS[task]
    place = EMBEDDED if info.embedded else find_place(info.benchmark, data, places)
    return describe_source(place, read_docs(info.benchmark, place, limit)).digest


def share(successes: int | float, n: int) -> dict[str, float | int | None]:
    """A mark without a loss: the share of right answers with its interval."""
    interval = wilson_interval(round(successes), n)
    return {
        "loss": None,
        "accuracy": successes / n,
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        "n": n,
    }
