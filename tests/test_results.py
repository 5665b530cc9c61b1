"""`results.json`: what is written is what is read, and nonsense is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ultrafuser.analysis.results import (
    Answer,
    AnswerToken,
    CurvePoint,
    Heatmap,
    HeatmapRow,
    Results,
    Score,
    read_results,
    write_results,
)
from ultrafuser.analysis.summary import best_models, duration, headline
from ultrafuser.errors import DataError


def score(loss: float, accuracy: float | None = None) -> Score:
    ends = (accuracy, accuracy) if accuracy is not None else (None, None)
    return Score(
        loss=loss,
        loss_low=loss,
        loss_high=loss,
        accuracy=accuracy,
        accuracy_low=ends[0],
        accuracy_high=ends[1],
        n=4,
        tokens=40,
    )


def make_results(**changes: Any) -> Results:
    fields: dict[str, Any] = {
        "name": "demo",
        "seconds": 3.5,
        "seed": 7,
        "recipe": {"name": "demo", "stage1": {"steps": 2, "learning_rate": 1e-3}},
        "versions": {"python": "3.11.2"},
        "hardware": {"cores": 2, "memory_gib": 7.5, "cpu": "some"},
        "scores": {
            "specialist:text": {"text": score(0.5, 0.5), "code": score(2.0, 0.0)},
            "specialist:code": {"text": score(3.0, 0.0), "code": score(0.2, 0.75)},
            "fused:stage2": {"text": score(0.4, 0.5), "code": score(0.3, 1.0)},
        },
        "heatmap": Heatmap(specialists=["text", "code"], rows=[HeatmapRow(domain="text", weights=[0.9, 0.1])]),
        "answers": [
            Answer(
                domain="text",
                question="Who?",
                expected="Me",
                correct=True,
                model="fused:stage2",
                tokens=[AnswerToken(text="Me", weights=[0.75, 0.25])],
            )
        ],
        "curves": {"stage1": [CurvePoint(step=1, loss={"text": 2.0, "code": 1.5})]},
        "timings": {"stage1": 1.0},
    }
    return Results(**{**fields, **changes})


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    """Through the file and back nothing changes, types of the hardware's values included."""
    results, path = make_results(), tmp_path / "runs" / "demo" / "results.json"

    write_results(results, path)

    assert read_results(path) == results
    assert [type(value) for value in read_results(path).hardware.values()] == [int, float, str]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full halfway costs the new file, never the old one."""
    path = tmp_path / "results.json"
    write_results(make_results(seed=1), path)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left"):
        write_results(make_results(seed=2), path)

    assert read_results(path).seed == 1
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_reading_names_the_file_and_the_field(tmp_path: Path) -> None:
    """A missing file, broken JSON and an unknown key are one clear line each."""
    path = tmp_path / "results.json"
    with pytest.raises(DataError, match=r"results\.json: No such file"):
        read_results(path)
    path.write_text('{"name": ')
    with pytest.raises(DataError, match=r"results\.json is no results file"):
        read_results(path)
    path.write_text(make_results().model_dump_json().replace('"seed"', '"sead"'))
    with pytest.raises(DataError, match="seed: Field required"):
        read_results(path)


def test_weights_must_fit_the_specialists() -> None:
    """A row of the heatmap and a token of an answer have one weight per specialist."""
    with pytest.raises(ValidationError, match="row 0 has 1 weights for 2 specialists"):
        Heatmap(specialists=["text", "code"], rows=[HeatmapRow(domain="text", weights=[1.0])])
    answer = make_results().answers[0].model_copy(update={"tokens": [AnswerToken(text="x", weights=[1.0])]})
    with pytest.raises(ValidationError, match="2 specialists: text, code"):
        make_results(answers=[answer])


def test_a_loss_that_is_no_number_is_refused() -> None:
    """JSON has no NaN, and a table has no place for one."""
    with pytest.raises(ValidationError, match="finite number"):
        score(float("nan"))


def test_an_accuracy_comes_with_its_interval() -> None:
    """Half an interval would be drawn as none."""
    with pytest.raises(ValidationError, match="give all three or none"):
        Score(loss=1, loss_low=1, loss_high=1, accuracy=0.5, n=1, tokens=1)


def test_specialists_come_from_whatever_names_them() -> None:
    """The heatmap's order wins; without it the gate weights, then the models."""
    bare: dict[str, Any] = {"heatmap": None, "answers": []}

    assert make_results().specialists == ["text", "code"]
    assert make_results(gate_weights={"f": {"d": {"b": 0.5, "a": 0.5}}}, **bare).specialists == ["b", "a"]
    assert make_results(**bare).specialists == ["text", "code"]
    assert make_results(scores={}, **bare).specialists == []


def test_the_best_of_a_column_may_be_several() -> None:
    """Ties are all best."""
    best = best_models(make_results(), "text")

    assert best.loss == {"fused:stage2"}
    assert best.accuracy == {"specialist:text", "fused:stage2"}


def test_the_headline_says_where_the_fused_model_wins_and_where_not() -> None:
    """Nothing is said where there is no fused model."""
    loss, accuracy = headline(make_results())

    assert loss == "fused:stage2 has a loss below the best specialist's in 1 of 2 domains; not in code."
    assert accuracy == "fused:stage2 has an accuracy not below the best specialist's in 2 of 2 domains."
    assert headline(make_results(scores={})) == []


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.25, "0.2 s"), (59.97, "1 min 0 s"), (236, "3 min 56 s"), (7260, "2 h 1 min")]
)
def test_durations_read_as_people_say_them(seconds: float, words: str) -> None:
    """Never 60 seconds or 60 minutes."""
    assert duration(seconds) == words
