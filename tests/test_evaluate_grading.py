"""What counts as an answer, and as a right one; every pitfall here cost somebody a wrong number."""

import time

import pytest

from ultrafuser.data.conclusions import boxed, conclusion, gsm8k_gold
from ultrafuser.errors import DataError
from ultrafuser.evaluation.grading.choices import chosen_letter
from ultrafuser.evaluation.grading.math import MathGrader, Verdict
from ultrafuser.evaluation.grading.math_worker import is_reasonable


@pytest.fixture(scope="module")
def grader():
    grader = MathGrader()
    yield grader
    grader.close()


@pytest.mark.parametrize(
    ("answer", "extracted"),
    [
        ("The answer is $18.00", "18.00"),
        ("The answer is 18...", "18"),
        ("The answer is 18..", "18"),
        ("18", "18"),
        ("The answer is 18 (that is 50% of 36).", "18"),
        ("The answer is: 1,234 dollars.", "1234"),
        ("the answer is 5 * 3 = 15.", "15"),
        ("So 5 + 3 = 8.\n#### 8", "8"),
        ("The answer is\n\n42", "42"),
        ("**Answer:** 12", "12"),
        ("The answer is 3.5 hours. I checked it 2 times.", "3.5"),
        ("The answer is 9. Wait, no. The answer is 7.", "7"),
        ("Final Answer: The final answer is $42$. I hope it is correct.", "42"),
        ("The answer is **-3**.", "-3"),
        ("It costs 10-2 dollars, which makes 8", "8"),
        ("thus \\boxed{\\frac{1}{2}} holds for all 3", "\\frac{1}{2}"),
        ("The answer is 7 or 8", None),
        ("The answer is either 7 and 8", None),
        ("no idea", None),
        ("", None),
        ("\\boxed{" + "1" * 5000 + "}", None),
        ("\\boxed{unclosed", None),
    ],
)
def test_a_solution_is_taken_at_its_conclusion(answer: str, extracted: str | None):
    assert conclusion(answer) == extracted


def test_boxes_are_closed_by_their_own_brace():
    assert boxed("a \\boxed{1} b \\boxed{x^{2} + \\frac{1}{3}} c") == "x^{2} + \\frac{1}{3}"


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 20_000,
        "The answer is $" + "\\" * 100_000,
        "1," * 50_000,
        "The answer is " + "7 or " * 30_000,
        "[" * 100_000,
    ],
    ids=["boxes", "backslashes", "commas", "hedges", "brackets"],
)
def test_no_answer_takes_long_to_read(text: str):
    """A pattern that tried every way to match would need minutes here."""
    start = time.monotonic()
    assert chosen_letter(text, "ABCDE") is None
    conclusion(text)
    assert time.monotonic() - start < 5.0


def test_a_gold_without_its_mark_is_refused():
    assert gsm8k_gold("so 1,200\n#### 1,200") == "1200"
    with pytest.raises(DataError, match="ends with '#### '"):
        gsm8k_gold("the answer is 12")


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("18", "The answer is $18.00"),
        ("18", "The answer is 18/1"),
        ("\\frac{1}{2}", "The answer is 0.5"),
        ("\\frac{1}{2}", "\\boxed{\\frac12}"),
        ("(1,2)", "The answer is (1, 2)"),
        ("x^2+1", "So it is \\boxed{1 + x^2}."),
        ("\\sqrt{8}", "\\boxed{2\\sqrt{2}}"),
    ],
)
def test_equal_answers_are_right_however_they_are_written(grader: MathGrader, gold: str, answer: str):
    assert grader.grade(gold, answer).outcome == "right"


@pytest.mark.parametrize(
    ("gold", "answer", "outcome"),
    [
        ("18", "The answer is 36", "wrong"),
        ("8", "\\boxed{7, 8}", "wrong"),
        ("8", "The answer is 7 or 8", "unparsed"),
        ("8", "The answer is 7, 8", "wrong"),
        ("3", "\\boxed{" + "{" * 1000 + "3" + "}" * 1000 + "}", "wrong"),
        ("3", "\\boxed{" + "9^" * 20 + "9}", "wrong"),
        ("3", "\\boxed{3!!!!!!!}", "wrong"),
        ("7", "", "unparsed"),
        ("7", "1 2 3 4 5 6 7 8 9", "wrong"),
    ],
)
def test_wrong_and_hedged_answers_are_not_right(grader: MathGrader, gold: str, answer: str, outcome: str):
    assert grader.grade(gold, answer).outcome == outcome


def test_text_of_a_model_is_never_run(grader: MathGrader, tmp_path):
    victim = tmp_path / "written"
    verdict = grader.grade("3", f"\\boxed{{__import__('pathlib').Path('{victim}').touch()}}")

    assert verdict.outcome != "right"
    assert not victim.exists()


def test_a_computation_without_end_is_killed_and_the_next_answer_is_graded():
    grader = MathGrader(deadline_s=1.0)
    try:
        grader.grade("\\frac{1}{2}", "\\boxed{\\frac{2}{4}}")  # starts the worker
        start = time.monotonic()

        verdict = grader.grade("3", "\\boxed{9^{9^{9^{9^9}}}}")

        assert verdict.outcome == "timeout"
        assert time.monotonic() - start < 3.0
        assert grader._worker is None
        grader.deadline_s = 30.0  # the new worker imports sympy lazily
        assert grader.grade("\\frac{1}{2}", "\\boxed{\\frac{2}{4}}").outcome == "right"
    finally:
        grader.close()


def test_a_gold_that_cannot_be_read_is_refused_before_anything_is_asked(grader: MathGrader):
    grader.check_golds(["3", "\\frac{1}{2}", "x+1", "\\text{even}", "(2,\\infty)", "90^\\circ", "\\{1,2\\}", "y=2x+3"])
    with pytest.raises(DataError, match="cannot be read by math-verify"):
        grader.check_golds(["3", "x+" + "1" * 61])


def test_a_checker_that_finds_everything_equal_is_noticed(monkeypatch: pytest.MonkeyPatch):
    grader = MathGrader()
    monkeypatch.setattr(grader, "_ask", lambda *_: "right")
    with pytest.raises(DataError, match="cannot be read"):
        grader.check_golds(["x+1"])


def test_plain_numbers_need_no_worker():
    grader = MathGrader()
    assert grader.grade("18", "The answer is 18.0") == Verdict("right", "18.0")
    assert grader._worker is None


def test_limits_of_what_sympy_is_given():
    assert is_reasonable("x^{2} + 1")
    assert not is_reasonable("1" * 61)
    assert not is_reasonable("(" * 33)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The answer is (B).", "B"),
        ("B", "B"),
        ("B.", "B"),
        ("B) 5", "B"),
        ("(C) 12 apples", "C"),
        ("\\boxed{D}", "D"),
        ("\\boxed{\\text{C}}", "C"),
        ("So the answer is: **E**", "E"),
        ("The correct option is C) 7", "C"),
        ("I begin.\nTherefore (D)", "D"),
        ("The answer is A. No: the answer is B.", "B"),
        ("The answer is A, B, C, D or E", None),
        ("The answer is A or B", None),
        ("The answer is B because 3 + 4 = 7", "B"),
        ("The answer is A, since C is wrong.", "A"),
        ("The answer is A good question", None),
        ("The answer would be 7. The answer should be D", "D"),
        ("The answer is (A) (B) (C) (D) (E)", None),
        ("A B C D E", None),
        ("(A) (B) (C) (D) (E)", None),
        ("A) 1\nB) 2\nC) 3", None),
        ("A car goes home", None),
        ("(A) is right, or not.\nTherefore (D)", None),
        ("the answer is a cat", None),
        ("The answer is 7", None),
        ("", None),
    ],
)
def test_a_letter_counts_once_settled_on(answer: str, letter: str | None):
    assert chosen_letter(answer, "ABCDE") == letter


def test_a_letter_beyond_the_options_is_none():
    assert chosen_letter("The answer is (E)", "ABCD") is None
