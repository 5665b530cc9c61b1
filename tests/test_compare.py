"""The comparison: what is made, what is skipped and why, what a second run costs, what the table says."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from training_helpers import TEMPLATES, TOKENIZER, make_conversations, make_specialist
from ultrafuser.compare import run as compare_run
from ultrafuser.compare.comparison import Comparison, Row, read_row
from ultrafuser.compare.run import compare
from ultrafuser.compare.table import markdown_table
from ultrafuser.compare.workshop import Workshop
from ultrafuser.config.recipe import Recipe
from ultrafuser.errors import ConfigError, DataError


@pytest.fixture(autouse=True, scope="module")
def few_timed_tokens() -> Iterator[None]:
    """Every model is timed while it answers; how long the answers are is no matter here."""
    patch = pytest.MonkeyPatch()
    patch.setattr(compare_run, "TIMED_TOKENS", 3)
    yield
    patch.undo()


TUNE = {"steps": 2, "learning_rate": 1e-2, "records_per_domain": 2, "warmup_steps": 0}


def make_recipe(folder: Path, **changes: Any) -> Recipe:
    """Two specialists tuned from one base, on two domains of a few records."""
    make_specialist(0).save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    for domain in TEMPLATES:
        lines = [json.dumps({"messages": [m.to_dict() for m in c]}) for c in make_conversations(domain, 60)]
        (folder / f"{domain}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    stage = {"steps": 2, "learning_rate": 1e-2, "records_per_domain": 2}
    return Recipe.model_validate(
        {
            "name": "tiny",
            "output": folder / "run",
            "specialists": {
                name: {"model": str(folder / "base"), "template": template, "tune": {**TUNE, "domains": [name]}}
                for name, template in TEMPLATES.items()
            },
            "gate": {"hidden_size": 8},
            "data": {
                "domains": {name: {"sources": [{"path": str(folder / f"{name}.jsonl")}]} for name in TEMPLATES},
                "validation_fraction": 0.1,
                "test_fraction": 0.2,
                "max_length": 128,
            },
            "train": {"device": "cpu", "checkpoint_every": 2, "validate_every": 2, "validation_records": 2},
            "stage1": stage,
            "stage2": {**stage, "train_specialists": True},
            **changes,
        }
    )


def rows_of(comparison: Comparison) -> dict[str, Row]:
    return {row.name: row for row in comparison.rows}


def test_every_model_is_made_examined_and_costed(tmp_path: Path):
    rows = rows_of(compare(make_recipe(tmp_path), limit=4))

    assert [name for name, row in rows.items() if row.skipped] == []
    assert set(rows) >= {"specialist:text", "further-tuned:code", "btx", "fusechat", "packllm", "copies", "direct"}
    for row in rows.values():
        assert set(row.marks) == {"text", "code"}
    one, three = rows["specialist:text"], rows["fused:stage2"]
    assert three.parameters_served is not None
    assert one.parameters_served is not None
    assert three.parameters_served > 2 * one.parameters_served  # by the gate
    assert (one.parameters_trained, three.parameters_trained) == (0, three.parameters_served)
    gate = three.parameters_served - 2 * one.parameters_served
    assert rows["fused:stage1"].parameters_trained == gate
    made = [row for row in rows.values() if row.parameters_served is not None]
    assert all(row.peak_bytes > row.weights_bytes > 0 < row.ms_per_token for row in made)  # type: ignore[operator]
    assert one.train_s == 0
    assert rows["fused:stage2"].train_s > rows["fused:stage1"].train_s > 0  # type: ignore[operator]


def test_a_second_comparison_makes_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = make_recipe(tmp_path)
    first = compare(recipe, limit=4, only=["specialist", "uniform"])
    monkeypatch.setattr(compare_run, "_row", lambda *_: pytest.fail("a row was made twice"))

    assert compare(recipe, limit=4, only=["specialist", "uniform"]).rows == first.rows


def test_rows_of_another_recipe_are_not_taken_over(tmp_path: Path):
    recipe = make_recipe(tmp_path)
    compare(recipe, limit=4, only=["uniform"])

    compare(recipe, limit=3, only=["uniform"])

    assert len(list((tmp_path / "run" / "compare" / "rows").iterdir())) == 2


def test_other_weights_or_records_under_the_same_names_are_refused(tmp_path: Path):
    """Their rows, and baselines trained from others, would stand in one table."""
    recipe = make_recipe(tmp_path)
    compare(recipe, limit=4, only=["specialist"])
    make_specialist(7).save_pretrained(tmp_path / "run" / "specialists" / "code")

    with pytest.raises(
        ConfigError, match=r"^specialist code: not what .*run/compare was made from.*--set output=FOLDER"
    ):
        compare(recipe, limit=4, only=["uniform"])

    lines = (tmp_path / "text.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "text.jsonl").write_text("\n".join(lines[:-5]), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^specialist code, the data: not what"):
        compare(recipe, limit=4, only=["uniform"])


def test_the_stages_are_the_ones_that_train_would_make(tmp_path: Path):
    """The comparison takes over what `train` has in the folder, and pays for it once."""
    from ultrafuser.train.pipeline import train

    recipe = make_recipe(tmp_path)
    train(recipe)
    metrics = recipe.folder / "stage2" / "metrics.jsonl"
    before = metrics.read_text(encoding="utf-8")

    compare(recipe, limit=4, only=["fused"])

    assert metrics.read_text(encoding="utf-8") == before


def test_a_model_that_cannot_be_made_is_a_row_that_says_why(tmp_path: Path):
    """Specialists of different sizes have no average, but they can be fused."""
    recipe = make_recipe(tmp_path)
    make_specialist(3, hidden_size=32).save_pretrained(tmp_path / "wide")
    TOKENIZER.save_pretrained(tmp_path / "wide")
    wide = recipe.specialists["code"].model_copy(update={"model": str(tmp_path / "wide"), "tune": None})
    recipe = recipe.model_copy(update={"specialists": {**recipe.specialists, "code": wide}})

    comparison = compare(recipe, limit=4, only=["task-arithmetic", "copies", "fused:stage1"])

    rows = rows_of(comparison)
    assert rows["task-arithmetic"].skipped == "the specialists have no common base in this recipe"
    assert rows["copies"].skipped == "the specialists have no common base in this recipe"
    assert rows["fused:stage1"].marks
    assert "* copies: left out: the specialists have no common base" in markdown_table(comparison)


def test_an_unknown_model_or_exam_is_refused(tmp_path: Path):
    recipe = make_recipe(tmp_path)
    with pytest.raises(ConfigError, match="no model 'mixtral' in the comparison; it has specialist:text"):
        compare(recipe, only=["mixtral"])
    with pytest.raises(ConfigError, match="unknown exam 'sat': choose held-out, demo, benchmarks"):
        compare(recipe, exam="sat")


def test_a_recipe_with_one_stage_has_nothing_to_compare(tmp_path: Path):
    with pytest.raises(ConfigError, match="at least two specialists, stage1 and stage2"):
        Workshop(make_recipe(tmp_path, stage2=None))


def test_a_device_that_is_not_here_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"train.device 'cuda:99' cannot be used here: write cpu"):
        Workshop(make_recipe(tmp_path, train={"device": "cuda:99"}))


def test_a_damaged_row_is_one_line(tmp_path: Path):
    (tmp_path / "row.json").write_text("{", encoding="utf-8")

    with pytest.raises(DataError, match=r"row\.json is no row of a comparison"):
        read_row(tmp_path / "row.json")


def test_the_oracle_is_right_where_any_specialist_is_and_chance_is_the_mean():
    marks = {"text": {"loss": 1.0, "accuracy": 0.5, "n": 4}}
    rows = [
        Row(name="specialist:a", what="", marks=marks, correct={"text": [True, True, False, False]}),
        Row(name="specialist:b", what="", marks=marks, correct={"text": [True, False, True, False]}),
    ]

    selected = {row.name: row.marks["text"]["accuracy"] for row in compare_run._selected(rows)}

    assert selected["selected:oracle"] == 0.75
    assert selected["selected:random"] == 0.5


def test_without_losses_the_best_specialist_is_the_most_accurate():
    rows = [
        Row(name=f"specialist:{name}", what="", marks={"gsm8k": {"loss": None, "accuracy": accuracy, "n": 4}})
        for name, accuracy in (("a", 0.25), ("b", 0.75))
    ]

    (best,) = compare_run._selected(rows)

    assert best.marks["gsm8k"]["accuracy"] == 0.75


def test_the_table_sets_the_best_model_of_a_column_in_bold_and_no_choice_with_hindsight():
    def row(name: str, loss: float, served: int | None) -> Row:
        return Row(name=name, what="made", marks={"text": {"loss": loss, "n": 1}}, parameters_served=served)

    rows = [row("a", 0.5, 10), row("b", 0.25, 10), row("best specialist", 0.1, None)]
    lines = markdown_table(
        Comparison(name="t", seed=0, exam="held-out", recipe={}, versions={}, hardware={}, rows=rows)
    ).splitlines()

    assert [line for line in lines if "**" in line and line.startswith("| ")] == [
        "| b | **0.250** | – | 0.00M | – | – | – | – |"
    ]


def test_names_are_whole_in_a_terminal_of_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    names = ["specialist:text", "further-tuned:math", "task-arithmetic", "selected:oracle"]
    cost = {"parameters_trained": 2_820_000, "parameters_served": 2_820_000, "weights_bytes": 11_300_000}
    cost |= {"peak_bytes": 519_000_000, "train_s": 236.0, "ms_per_token": 12.8}
    marks = {domain: {"loss": 6.264, "accuracy": 0.975, "n": 200} for domain in ("text", "code", "math", "mixed")}
    rows = [Row(name=name, what="made", marks=marks, **cost) for name in names]  # type: ignore[arg-type]
    monkeypatch.setenv("COLUMNS", "80")

    compare_run.print_comparison(
        Comparison(name="t", seed=0, exam="demo", recipe={}, versions={}, hardware={}, rows=rows), tmp_path
    )

    lines = capsys.readouterr().out.splitlines()
    assert not any("…" in line for line in lines)
    assert max(map(len, lines)) <= 80 or str(tmp_path) in max(lines, key=len)
    for name in names:
        assert sum(line.strip().startswith(f"{name} ") for line in lines) == 2
    assert sum("519" in line for line in lines) == len(names)


def test_a_reward_model_chooses_where_answers_can_be_checked(tmp_path: Path):
    """On held-out records nobody can tell a right answer, so the row says so."""
    from test_baselines_generators import save_reward_model

    reward = str(save_reward_model(tmp_path / "reward"))

    rows = rows_of(compare(make_recipe(tmp_path), limit=2, only=["selected"], reward_model=reward))

    assert "say nothing about chosen answers" in str(rows["selected:reward-model"].skipped)


def test_another_judge_gets_a_row_of_its_own(tmp_path: Path):
    """Who chooses is not in the recipe, so a row must not be taken over for its sake."""
    recipe, asked = make_recipe(tmp_path), []

    def ask(prompts: Any) -> list[str]:
        asked.append(len(prompts))
        return ["[[A]]"] * len(prompts)

    options: dict[str, Any] = {"exam": "benchmarks", "tasks": ["tiny_choice"], "limit": 2, "only": ["selected"]}
    calls = []
    for name in ("one", "one", "two"):
        rows = rows_of(compare(recipe, **options, ask_judge=ask, judge_name=name))
        assert rows["selected:judge"].what == f"the specialists' answer that {name} prefers"
        calls.append(len(asked))

    # The answers are in the journal, and the timing asks the judge anew; only the second run has nothing to make.
    assert calls[0] > 0
    assert calls[1] == calls[0]
    assert calls[2] > calls[1]


def test_benchmarks_take_the_place_of_domains(tmp_path: Path):
    told_of: set[Any] = set()
    comparison = compare(
        make_recipe(tmp_path),
        exam="benchmarks",
        tasks=["tiny_choice", "tiny_truth"],
        limit=2,
        only=["specialist", "fused:stage1", "routed"],
        max_tokens=8,
        watch=lambda *told: told_of.add(told[:2]),
    )

    assert ("routed", "tiny_choice") in told_of
    rows = rows_of(comparison)
    for name in ("specialist:text", "specialist:code", "fused:stage1", "routed"):
        assert rows[name].skipped is None
        assert set(rows[name].marks) == {"tiny_choice", "tiny_truth"}
        assert all(mark["n"] and mark["loss"] is None for mark in rows[name].marks.values())
    # Where answers are written one can choose among them; where given ones are scored there is nothing to choose.
    assert len(rows["specialist:text"].correct["tiny_choice"]) == 2
    assert set(rows["selected:oracle"].marks) == set(rows["selected:random"].marks) == {"tiny_choice"}
    assert set(rows["best specialist"].marks) == {"tiny_choice", "tiny_truth"}


def test_missing_data_are_said_before_anything_is_trained(tmp_path: Path):
    with pytest.raises(DataError, match="math is not among the data files"):
        compare(
            make_recipe(tmp_path), exam="benchmarks", tasks=["gsm8k", "math"], places={"gsm8k": "embedded"}, limit=2
        )

    assert not (tmp_path / "run").exists()


def test_other_questions_get_rows_of_their_own(tmp_path: Path):
    recipe, problems = make_recipe(tmp_path), tmp_path / "math.jsonl"
    options: dict[str, Any] = {"exam": "benchmarks", "tasks": ["math"], "limit": 2, "only": ["specialist:text"]}
    for question in ("What is 1 + 1?", "What is 2 + 0?"):
        problems.write_text(json.dumps({"problem": question, "answer": "2"}), encoding="utf-8")
        rows = rows_of(compare(recipe, **options, places={"math": str(problems)}, max_tokens=4))
        assert rows["specialist:text"].marks["math"]["n"] == 1

    assert len(list((tmp_path / "run" / "compare" / "rows").iterdir())) == 2


def test_judged_tasks_have_no_accuracy_to_compare(tmp_path: Path):
    with pytest.raises(ConfigError, match="mt_bench is judged, which has no accuracy"):
        compare(make_recipe(tmp_path), exam="benchmarks", tasks=["mt_bench"])
