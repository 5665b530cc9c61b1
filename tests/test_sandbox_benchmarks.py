"""Right solutions pass all of HumanEval and MBPP in the sandbox; an object that equals everything passes none."""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ultrafuser.errors import SandboxError
from ultrafuser.sandbox.extract import extract_code
from ultrafuser.sandbox.job import TestJob, humaneval_job, mbpp_job
from ultrafuser.sandbox.outcome import Outcome
from ultrafuser.sandbox.sandbox import Sandbox, open_sandbox

DATA = Path(os.environ.get("ULTRAFUSER_DATA", Path(__file__).parents[2] / "shared" / "data"))

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is for Linux"),
    pytest.mark.skipif(not (DATA / "eval").is_dir(), reason=f"no data in {DATA}: set ULTRAFUSER_DATA"),
]

CHEAT = """
class Equal:
    def __getattribute__(self, name): return lambda *arguments, **options: Equal()
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
    def __add__(self, other): return self
    __radd__ = __sub__ = __rsub__ = __mul__ = __mod__ = __add__
    def __abs__(self): return 0
    def __len__(self): return 0
    def __iter__(self): return iter(())
    def __hash__(self): return 0
    def __getitem__(self, key): return self

def {name}(*arguments, **options): return Equal()
"""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    try:
        opened = open_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))
    with opened:
        yield opened


def humaneval() -> list[dict[str, Any]]:
    with gzip.open(DATA / "eval" / "humaneval.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def mbpp() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / "eval" / "mbpp.jsonl").read_text().splitlines()]


def job_of_humaneval(row: dict[str, Any], code: str) -> TestJob:
    return humaneval_job(code, prompt=row["prompt"], test=row["test"], entry_point=row["entry_point"])


def job_of_mbpp(row: dict[str, Any], code: str) -> TestJob:
    # Task 123 computes for seconds, which a busy machine makes more than the usual ten.
    limit_s = 60.0
    return mbpp_job(
        code, tests=row["test_list"], reference=row["code"], test_setup=row["test_setup_code"], time_limit_s=limit_s
    )


def not_passed(sandbox: Sandbox, jobs: list[TestJob]) -> dict[int, str]:
    results = sandbox.run(jobs)
    return {n: f"{result.outcome}: {result.detail}" for n, result in enumerate(results) if not result.is_pass}


def test_canonical_solutions_of_humaneval_pass(sandbox: Sandbox) -> None:
    rows = humaneval()

    assert len(rows) == 164
    jobs = [job_of_humaneval(row, row["prompt"] + row["canonical_solution"]) for row in rows]
    assert not_passed(sandbox, jobs) == {}


def test_canonical_solutions_in_an_answer_pass(sandbox: Sandbox) -> None:
    """The body alone, and the whole function in a fence with talk around it."""
    rows = humaneval()[::2]
    whole = [f"Sure!\n```python\n{row['prompt']}{row['canonical_solution']}```\nDone." for row in rows]
    bodies = [row["canonical_solution"] for row in rows]

    for answers in (whole, bodies):
        jobs = [
            job_of_humaneval(row, extract_code(answer, entry_point=row["entry_point"], prompt=row["prompt"]))
            for row, answer in zip(rows, answers, strict=True)
        ]
        assert not_passed(sandbox, jobs) == {}


def test_an_object_that_equals_everything_passes_nothing(sandbox: Sandbox) -> None:
    jobs = [job_of_humaneval(row, CHEAT.format(name=row["entry_point"])) for row in humaneval()]

    outcomes = {result.outcome for result in sandbox.run(jobs)}

    assert outcomes == {Outcome.TYPE_ERROR}


def passes_in_one_interpreter(row: dict[str, Any], code: str) -> bool:
    """The usual way: code and test in one process. Only ever given what stands in this file."""
    try:
        exec(f"{row['prompt']}\n    pass\n{code}\n{row['test']}\ncheck({row['entry_point']})", {})
    except Exception:
        return False
    return True


def test_the_same_object_passes_most_where_code_and_test_share_an_interpreter() -> None:
    """So it is the separation that stops it, not a weak cheat."""
    passed = sum(passes_in_one_interpreter(row, CHEAT.format(name=row["entry_point"])) for row in humaneval())

    assert passed > 120


def test_reference_solutions_of_mbpp_pass(sandbox: Sandbox) -> None:
    """All of them, those included that hand trees of their own classes to and fro, or are called `sum`."""
    rows = mbpp()

    assert len(rows) == 974
    assert not_passed(sandbox, [job_of_mbpp(row, row["code"].replace("\r\n", "\n")) for row in rows]) == {}


def test_an_object_that_equals_everything_passes_nothing_of_mbpp(sandbox: Sandbox) -> None:
    jobs = []
    for row in mbpp()[::3]:
        job = job_of_mbpp(row, "")
        code = CHEAT.format(name=job.entry_points[0]) + "\n".join(f"{name} = Equal" for name in job.classes)
        jobs.append(job_of_mbpp(row, code))

    outcomes = Counter(result.outcome for result in sandbox.run(jobs))

    assert outcomes[Outcome.PASS] == 0
    assert outcomes[Outcome.TYPE_ERROR] > 0.98 * len(jobs)
