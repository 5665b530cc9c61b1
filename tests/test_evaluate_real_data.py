"""The published files are read whole, and every right answer in them is right by our own graders."""

import os
from pathlib import Path

import pytest

from ultrafuser.data.conclusions import conclusion
from ultrafuser.evaluation.benchmarks import find_place, read_docs
from ultrafuser.evaluation.grading.choices import chosen_letter
from ultrafuser.evaluation.grading.math import MathGrader

DATA = Path(os.environ.get("ULTRAFUSER_DATA", Path(__file__).parents[2] / "shared" / "data"))

pytestmark = pytest.mark.skipif(not (DATA / "eval").is_dir(), reason=f"no data in {DATA}: set ULTRAFUSER_DATA")


def docs(benchmark: str) -> list[dict]:
    return read_docs(benchmark, find_place(benchmark, DATA, {}))


@pytest.mark.parametrize(
    ("benchmark", "questions", "documents"),
    [
        ("gsm8k", 1319, 1319),
        ("sat_math", 220, 220),
        ("aqua", 254, 254),
        ("truthfulqa", 817, 6204),
        ("truthfulqa_mc", 817, 817),
        ("humaneval", 164, 164),
        ("mbpp", 500, 500),
        ("alpaca_eval", 805, 805),
        ("alpaca_eval_1", 805, 805),
        ("mt_bench", 80, 80),
        ("mt_bench_reference", 30, 30),
        ("judge_prompts", 8, 8),
    ],
)
def test_every_published_row_becomes_a_document(benchmark: str, questions: int, documents: int):
    found = docs(benchmark)

    assert len(found) == documents
    assert len({doc.get("group", doc["id"]) for doc in found}) == questions
    assert len({doc["id"] for doc in found}) == documents


def test_the_published_solutions_of_gsm8k_are_right_and_their_neighbours_are_not():
    grader = MathGrader()
    for doc in docs("gsm8k"):
        assert grader.grade(doc["gold"], f"Some work with 3 numbers.\n#### {doc['gold']}").outcome == "right"
        assert grader.grade(doc["gold"], f"The answer is {doc['gold']}1.").outcome == "wrong"
        assert conclusion(f"So, the answer is ${int(doc['gold']):,}.") == doc["gold"]
    assert grader._worker is None


@pytest.mark.parametrize("benchmark", ["aqua", "sat_math"])
def test_every_option_is_shown_once_without_its_old_letter(benchmark: str):
    for doc in docs(benchmark):
        lines = doc["options"].split("\n(")
        assert len(lines) == len(doc["letters"])
        assert all(f"({letter}) {letter})" not in doc["options"] for letter in doc["letters"])
        assert all(f"({letter}) ({letter})" not in doc["options"] for letter in doc["letters"])
        assert chosen_letter(f"The answer is ({doc['gold']}).", doc["letters"]) == doc["gold"]


def test_humaneval_is_asked_by_signature_and_docstring():
    first = docs("humaneval")[0]
    assert first["signature"] == "has_close_elements(numbers: List[float], threshold: float) -> bool"
    assert first["docstring"].startswith("Check if in given list of numbers")
    assert all(doc["docstring"] and doc["entry_point"] in doc["signature"] for doc in docs("humaneval"))
