"""The demo's world: items are reproducible and disjoint, and the checks tell right answers from wrong ones."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ultrafuser.demo.world import (
    DOMAINS,
    Computes,
    Concludes,
    Item,
    Says,
    Split,
    are_correct,
    build,
    is_correct,
    make_items,
    make_mixed,
    split_of,
    split_parts,
)
from ultrafuser.demo.world.facts import RELATIONS
from ultrafuser.demo.world.mixed import COMPOSITIONS
from ultrafuser.demo.world.sandbox import Call, run_functions
from ultrafuser.demo.world.text import fact_questions
from ultrafuser.errors import DataError

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
DOUBLE = Item("code", "", "", "", (Computes("double", (("1", "2"), ("-3", "-6"))),))
RIGHT = "def double(x):\n    return x * 2"


@pytest.mark.parametrize("domain", [*DOMAINS, "mixed"])
def test_the_same_seed_gives_the_same_items_and_another_seed_others(domain: str) -> None:
    items = make_items(domain, "test", 40, seed=3)

    assert items == make_items(domain, "test", 40, seed=3)
    assert items[:10] == make_items(domain, "test", 10, seed=3)
    assert items != make_items(domain, "test", 40, seed=4)
    assert len({item.question for item in items}) == 40
    assert {item.domain for item in items} == {domain}


@pytest.mark.parametrize("domain", DOMAINS)
def test_splits_share_no_question(domain: str) -> None:
    items = {split: make_items(domain, split, 150, seed=0) for split in SPLITS}

    for split in SPLITS:
        assert {split_of(item.question) for item in items[split]} == {split}
    questions = [item.question for split in SPLITS for item in items[split]]
    assert len(set(questions)) == len(questions) == 450


def test_the_name_of_a_function_does_not_move_its_task_to_another_split() -> None:
    tasks = [f"that takes a number n: add {k}." for k in range(20)]

    assert all(split_of(f"Write a function run {task}") == split_of(f"Write a function calc {task}") for task in tasks)


def test_every_fact_can_be_learned_from_the_training_split() -> None:
    for relation in RELATIONS:
        for subject in relation.values:
            assert "train" in map(split_of, fact_questions(relation, subject)), subject


@pytest.mark.parametrize("domain", [*DOMAINS, "mixed"])
def test_reference_answers_pass_and_answers_to_other_questions_fail(domain: str) -> None:
    items = make_items(domain, "validation", 60, seed=1)
    answers = [item.answer for item in items]

    assert all(are_correct(items, answers))
    shifted = are_correct(items, answers[1:] + answers[:1])
    assert sum(shifted) < 0.15 * len(items)  # two questions may have the same answer
    assert not any(are_correct(items, [""] * len(items)))


def test_a_text_answer_that_hedges_is_wrong() -> None:
    item = Item("text", "", "", "", (Says("Paris", ("Rome", "Oslo")),))

    assert are_correct([item] * 4, ["It is Paris.", "paris", "It is Paris or Rome.", "Parisian"]) == [
        *(True, True, False, False),
    ]
    assert not is_correct(item, "It is Paris.\nIt is Rome.")


def test_a_math_answer_counts_by_its_conclusion() -> None:
    item = Item("math", "", "", "", (Concludes(19),))
    answers = ["The answer is 19.", "12 + 7 = 19.", "The answer is 190.", "The answer is 19. The answer is 18."]

    assert are_correct([item] * 4, answers) == [True, False, False, False]


def test_a_code_answer_counts_by_what_it_computes() -> None:
    answers = [
        *(RIGHT, "def double(n):\n    n += n\n    return n", "def double(x):\n    return x * 3"),
        *("def twice(x):\n    return x * 2", "def double(x)\n    return x * 2", "double = lambda x: x * 2", "x" * 9000),
    ]

    assert are_correct([DOUBLE] * len(answers), answers) == [True, True, *[False] * 5]


@pytest.mark.parametrize("domain", DOMAINS)
def test_questions_and_answers_are_short(domain: str) -> None:
    assert max(len(item.question) + len(item.answer) for item in make_items(domain, "train", 500, seed=0)) < 200


def test_mixed_questions_have_parts_of_different_domains_put_together_as_in_no_training_record() -> None:
    items = make_mixed("test", 60, seed=0)

    assert {item.kind for item in items} == {composition.name for composition in COMPOSITIONS}
    assert "{}\n{}" not in {composition.template for composition in COMPOSITIONS}  # the join training uses
    assert sum(composition.near for composition in COMPOSITIONS) * 2 >= len(COMPOSITIONS)
    for item in items:
        kinds = {type(check) for check in item.checks}
        assert len(kinds) == len(item.checks) == len(split_parts(item.answer)) >= 2
    on_lines = [item for item in items if item.kind in ("three lines", "blank line")]
    assert {split_of(part) for item in on_lines for part in item.question.split("\n") if part} == {"test"}
    with pytest.raises(DataError, match="validation and test"):
        make_mixed("train", 1, seed=0)


def test_a_mixed_answer_needs_every_part_in_order() -> None:
    item = Item("mixed", "", "", "", (Concludes(5), *DOUBLE.checks, Says("cold", ("hot",))))
    math, text = "2 + 3 = 5. The answer is 5.", "It is cold."
    answers = [
        f"{math}\n{RIGHT}\n{text}",
        f"1) {math}\n\n2) {RIGHT}\n\n3) {text}\n",
        f"{math}\n{RIGHT}",
        f"{math}\n{text}\n{RIGHT}",
        f"{math}\n{RIGHT}\nIt is hot.",
        f"{math}\n{RIGHT.replace('2', '3')}\n{text}",
        f"{math}\n{RIGHT}\n{text}\n{text}",
    ]

    assert are_correct([item] * len(answers), answers) == [True, True, *[False] * 5]


def test_hostile_code_loses_only_itself(tmp_path: Path) -> None:
    body = {
        "infinite loop": "while True:\n        pass",
        "endless in C": "return sum(range(10 ** 15))",
        "huge memory": "return len([0] * 10 ** 10)",
        "huge number": "return 9 ** 9 ** 9 ** 9",
        "huge result": "return 'x' * 10 ** 7",
        "recursion": "return double(x)",
        "import": "import os\n    os.system('true')",
        "sneaky import": "return __import__('os').system('true')",
        "exit": "return exit()",
        "classes": "return ().__class__.__base__.__subclasses__()",
        "file": f"open({str(tmp_path / 'trace')!r}, 'w').write('x')",
        "deep nesting": "return " + "-" * 1900 + "x",
    }
    answers = [RIGHT, *(f"def double(x):\n    {lines}\n    return x * 2" for lines in body.values()), RIGHT]
    start = time.monotonic()

    verdicts = are_correct([DOUBLE] * len(answers), answers)

    assert verdicts == [True, *[False] * len(body), True]
    assert time.monotonic() - start < 30
    assert not (tmp_path / "trace").exists()


def test_top_level_statements_never_run() -> None:
    call = Call(f"{RIGHT}\nprint(double(1))", "double", ("1",))

    assert run_functions([call, Call(RIGHT, "double", ("1", "[2]"))]) == [None, ["2", "[2, 2]"]]


def test_a_domain_that_is_unknown_or_too_small_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "MAX_MISSES", 2)

    with pytest.raises(DataError, match="text, code, math"):
        make_items("music", "train", 1, seed=0)
    with pytest.raises(DataError, match="ask for fewer"):
        make_items("text", "test", 10**5, seed=0)
