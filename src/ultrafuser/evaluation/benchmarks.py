"""The benchmarks as documents: where each one's file lies, and how its published rows become what a task reads.

A document is a flat dict of strings, numbers and lists with an `id`, and with a `group` where several documents
belong to one question.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from ultrafuser.data.benchmarks import MBPP_TEST_IDS
from ultrafuser.data.conclusions import boxed, gsm8k_gold
from ultrafuser.data.files import HUB_PREFIX, read_entries
from ultrafuser.data.formats import RecordError
from ultrafuser.errors import ConfigError, DataError

Doc = dict[str, Any]
Row = Mapping[str, Any]
EMBEDDED = "embedded"  # the place of the small sets of our own that travel with the package


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A test set: its file in the data folder (empty where the user must name one), and its rows as documents."""

    file: str
    read: Callable[[Row, int], Sequence[Doc]]
    keep: Callable[[Row], bool] = lambda _: True


class Source(NamedTuple):
    """What was read: the place, the SHA-256 of its documents, and how many questions."""

    place: str
    digest: str
    num_questions: int


def find_place(benchmark: str, data: Path | None, places: Mapping[str, str]) -> str:
    """Where a benchmark is to be read from: the place the user names, or its file in the data folder.

    Args:
        benchmark: A name in `BENCHMARKS`.
        data: Folder with the files, or one whose folder `eval` has them.
        places: Benchmark to file, folder or `hub:owner/name[:config][@revision][#split]`.

    Raises:
        ConfigError: No such benchmark.
        DataError: No place was named and the folder has no such file.
    """
    if benchmark not in BENCHMARKS:
        raise ConfigError(f"no benchmark is called {benchmark!r}; known: {', '.join(BENCHMARKS)}")
    if benchmark in places:
        return places[benchmark]
    file = BENCHMARKS[benchmark].file
    if not file:
        raise DataError(
            f"{benchmark} is not among the data files, for its problems are others' property: name yours with "
            f"--source {benchmark}=FILE or --source {benchmark}=hub:OWNER/NAME#test"
        )
    for folder in (data, data / "eval") if data is not None else ():
        if (folder / file).is_file():
            return str(folder / file)
    where = f"{data} has no {file}" if data is not None else "no data folder is given"
    raise DataError(f"{benchmark}: {where}: give a folder with --data, or a place with --source {benchmark}=PLACE")


def read_docs(benchmark: str, place: str, limit: int | None = None) -> list[Doc]:
    """The documents of a benchmark.

    Args:
        benchmark: A name in `BENCHMARKS`.
        place: A file, a folder, a hub id, or "embedded".
        limit: Only the first so many questions.

    Raises:
        DataError: The place cannot be read, or a row is not that benchmark's; says which.
    """
    docs: list[Doc] = []
    chosen = BENCHMARKS[benchmark]
    index = 0
    for where, row in _entries(benchmark, place):
        if limit is not None and index >= limit:
            break
        try:
            if not isinstance(row, Mapping):
                raise TypeError(str(row) if isinstance(row, RecordError) else "not an object")
            if not chosen.keep(row):
                continue
            docs += chosen.read(row, index)
        except (KeyError, TypeError, ValueError, AttributeError, SyntaxError, DataError) as error:
            raise DataError(f"{where} is no item of {benchmark}: {type(error).__name__}: {error}") from error
        index += 1
    if not docs:
        raise DataError(f"{place} holds no item of {benchmark}")
    return docs


def describe_source(place: str, docs: Sequence[Doc]) -> Source:
    """Place, content hash and size of what was read."""
    text = json.dumps(docs, sort_keys=True, ensure_ascii=True)
    return Source(place, hashlib.sha256(text.encode()).hexdigest(), len({doc.get("group", doc["id"]) for doc in docs}))


def _entries(benchmark: str, place: str) -> Iterator[tuple[str, object]]:
    if place == EMBEDDED:
        text = (files("ultrafuser.evaluation") / "tasks" / "embedded" / f"{benchmark}.jsonl").read_text("utf-8")
        return ((f"embedded {benchmark}:{n}", json.loads(line)) for n, line in enumerate(text.splitlines(), start=1))
    return read_entries(place if place.startswith(HUB_PREFIX) else Path(place))


def _gsm8k(row: Row, index: int) -> list[Doc]:
    return [{"id": str(index), "question": row["question"], "gold": gsm8k_gold(row["answer"])}]


def _math(row: Row, index: int) -> list[Doc]:
    gold = row.get("answer") or boxed(row.get("solution", ""))
    if not gold:
        raise ValueError("it has neither an answer nor a solution with \\boxed{...}")
    identity = row.get("unique_id") or row.get("id") or index
    return [{"id": str(identity), "question": row["problem"], "gold": str(gold)}]


def _options(question: str, options: Sequence[str], gold: str, index: int) -> list[Doc]:
    letters = "ABCDEFGHIJ"[: len(options)]
    texts = [re.sub(rf"^\s*(?:\(?{letter}\)\s*)+", "", option) for letter, option in zip(letters, options, strict=True)]
    if len(options) < 2 or gold not in letters or len(gold) != 1:
        raise ValueError(f"its answer {gold!r} is none of its {len(options)} options")
    shown = "\n".join(f"({letter}) {text}" for letter, text in zip(letters, texts, strict=True))
    return [{"id": str(index), "question": question, "options": shown, "letters": letters, "gold": gold}]


def _aqua(row: Row, index: int) -> list[Doc]:
    return _options(row["question"], row["options"], row["correct"], index)


def _sat_math(row: Row, index: int) -> list[Doc]:
    passage = f"{row['passage']}\n" if row.get("passage") else ""
    return _options(passage + row["question"], row["options"], row["label"], index)


def _truthfulqa_mc(row: Row, index: int) -> list[Doc]:
    labels = dict(row["mc2_targets"])
    best = [option for option, label in row["mc1_targets"].items() if label == 1]
    if len(best) != 1 or not set(row["mc1_targets"]) <= set(labels) or not {0, 1} >= set(labels.values()):
        raise ValueError("MC1 needs one right option, and all of its options in MC2")
    return [
        {
            "id": str(index),
            "question": row["question"],
            "options": list(labels),
            "labels": [int(label) for label in labels.values()],
            "in_mc1": [int(option in row["mc1_targets"]) for option in labels],
            "best": list(labels).index(best[0]),
        }
    ]


def _truthfulqa(row: Row, index: int) -> list[Doc]:
    labels = row["mc2_targets"]
    return [
        {"id": f"{index}/{n}", "group": str(index), "question": row["question"], "option": option, "gold": int(label)}
        for n, (option, label) in enumerate(labels.items())
    ]


def _humaneval(row: Row, index: int) -> list[Doc]:
    del index
    prompt, entry = row["prompt"], row["entry_point"]
    functions = [n for n in ast.parse(prompt + "    pass\n").body if isinstance(n, ast.FunctionDef)]
    function = next((n for n in functions if n.name == entry), None)
    if function is None:
        raise ValueError(f"its prompt defines no function {entry!r}")
    signature = ast.unparse(ast.FunctionDef(**{**vars(function), "body": [ast.Pass()]})).splitlines()[-2]
    texts = [str(n.value.value) for n in function.body if isinstance(n, ast.Expr) and _is_text(n.value)]
    if not texts:
        raise ValueError(f"{entry!r} has no docstring")
    docstring = inspect.cleandoc(texts[0])  # not always the first statement: one item imports before it
    doc = {"id": row["task_id"], "prompt": prompt, "signature": signature.removeprefix("def ").rstrip(":")}
    return [doc | {"docstring": docstring, "entry_point": entry, "test": row["test"]}]


def _is_text(node: ast.expr) -> TypeGuard[ast.Constant]:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _mbpp(row: Row, index: int) -> list[Doc]:
    del index
    tests = [str(test) for test in row["test_list"]]
    if not tests:
        raise ValueError("it has no tests")
    for test in tests:
        ast.parse(test)
    doc = {"id": str(row["task_id"]), "text": row["text"], "tests": tests, "reference": row["code"]}
    return [doc | {"setup": row.get("test_setup_code", "")}]


def _alpaca(row: Row, index: int) -> list[Doc]:
    return [{"id": str(index), "question": row["instruction"], "reference": row["output"]}]


def _mt_bench(row: Row, index: int) -> list[Doc]:
    del index
    if len(row["turns"]) != 2:
        raise ValueError(f"it has {len(row['turns'])} turns where 2 are due")
    return [{"id": str(row["question_id"]), "category": row["category"], "turns": list(row["turns"])}]


def _mt_bench_reference(row: Row, index: int) -> list[Doc]:
    del index
    return [{"id": str(row["question_id"]), "turns": [str(turn) for turn in row["choices"][0]["turns"]]}]


def _judge_prompt(row: Row, index: int) -> list[Doc]:
    del index
    return [{"id": row["name"], "system": row["system_prompt"], "template": row["prompt_template"]}]


BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k": Benchmark("gsm8k_test.jsonl", _gsm8k),
    "math": Benchmark("", _math),
    "sat_math": Benchmark("sat_math.jsonl", _sat_math),
    "aqua": Benchmark("aqua_test.jsonl", _aqua),
    "truthfulqa": Benchmark("truthfulqa_v1_mc.json", _truthfulqa),
    "truthfulqa_mc": Benchmark("truthfulqa_v1_mc.json", _truthfulqa_mc),
    "humaneval": Benchmark("humaneval.jsonl.gz", _humaneval),
    "mbpp": Benchmark("mbpp.jsonl", _mbpp, keep=lambda row: row["task_id"] in MBPP_TEST_IDS),
    "alpaca_eval": Benchmark("alpaca_eval_gpt4_1106_preview.json", _alpaca),
    "alpaca_eval_1": Benchmark("alpaca_eval_text_davinci_003.json", _alpaca),
    "mt_bench": Benchmark("mt_bench_questions.jsonl", _mt_bench),
    "mt_bench_reference": Benchmark("mt_bench_reference_gpt4.jsonl", _mt_bench_reference),
    "judge_prompts": Benchmark("mt_bench_judge_prompts.jsonl", _judge_prompt),
}
JUDGED_WITH = {  # what judging needs besides the questions
    "alpaca_eval": ("judge_prompts",),
    "alpaca_eval_1": ("judge_prompts",),
    "mt_bench": ("judge_prompts", "mt_bench_reference"),
}
