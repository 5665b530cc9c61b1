"""The demo from end to end, with a few steps in place of hundreds: what it writes, that it repeats and resumes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ultrafuser.analysis.results import Results, read_results
from ultrafuser.demo import ingredients
from ultrafuser.demo import recipe as demo_recipe
from ultrafuser.demo import run as demo_run
from ultrafuser.demo.run import check_own, run_demo
from ultrafuser.errors import ConfigError
from ultrafuser.model.fused import FusedForCausalLM

MODELS = [
    "specialist:text",
    "specialist:code",
    "specialist:math",
    "average",
    "uniform",
    "further-tuned",
    "direct",
    "fused:stage1",
    "fused:stage2",
]
DOMAINS = ["text", "code", "math", "mixed"]


@pytest.fixture(scope="module")
def short_demo() -> Iterator[None]:
    """Two steps of everything, three questions of each domain, models of one layer."""

    def untrained_model(tokenizer: Any, seed: int) -> Any:
        model = ingredients.untrained_model(tokenizer, seed)
        del model.model.layers[1:]
        model.config.num_hidden_layers = 1
        return model

    few = {"steps": 2, "records_per_domain": 2, "warmup_steps": 1}
    patch = pytest.MonkeyPatch()
    patch.setattr(demo_run, "BASE", demo_run.BASE.model_copy(update=few))
    patch.setattr(demo_run, "FURTHER", demo_run.FURTHER.model_copy(update=few))
    patch.setattr(demo_run, "untrained_model", untrained_model)
    patch.setattr(demo_run, "ITEMS_PER_DOMAIN", 120)
    patch.setattr(demo_run, "TEST_ITEMS", 3)
    for name in ("TUNE", "STAGE1", "STAGE2"):
        patch.setattr(demo_recipe, name, getattr(demo_recipe, name).model_copy(update=few))
    patch.setattr(demo_recipe, "TUNE_STEPS", dict.fromkeys(demo_recipe.TUNE_STEPS, 2))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def finished(short_demo: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:  # noqa: ARG001
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder, seed=3)


def test_every_model_is_scored_on_every_domain(finished: tuple[Path, Results]):
    folder, results = finished

    scores = json.loads((folder / "results.json").read_text(encoding="utf-8"))["scores"]
    assert list(scores) == MODELS
    for by_domain in scores.values():
        assert list(by_domain) == DOMAINS
        for score in by_domain.values():
            assert score["n"] == 3
            assert score["loss_low"] <= score["loss"] <= score["loss_high"]
            assert 0 <= score["accuracy"] <= 1
    assert read_results(folder / "results.json") == results


def test_the_folder_has_a_report_a_recipe_and_a_model_that_loads(finished: tuple[Path, Results]):
    folder, _ = finished

    assert "fused:stage2" in (folder / "report.html").read_text(encoding="utf-8")
    assert (folder / "recipe.yaml").read_text(encoding="utf-8").startswith("name: demo")
    assert FusedForCausalLM.from_pretrained(folder / "model").names == ["text", "code", "math"]


def test_a_fresh_run_may_delete_a_demo_and_nothing_else(finished: tuple[Path, Results], tmp_path: Path):
    folder, _ = finished
    check_own(folder)
    (tmp_path / "untrained").mkdir()
    check_own(tmp_path)

    for name in ("thesis.txt", "model-of-mine"):
        (tmp_path / name).mkdir()
        with pytest.raises(ConfigError, match=f"holds {name}, which no demo wrote, so --fresh does not delete it"):
            run_demo(tmp_path, fresh=True)
        (tmp_path / name).rmdir()
    (tmp_path / "untrained").rename(tmp_path / "data")
    with pytest.raises(ConfigError, match="holds no demo"):
        run_demo(tmp_path, fresh=True)

    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(finished: tuple[Path, Results], tmp_path: Path):
    _, results = finished

    assert run_demo(tmp_path / "same", seed=3).scores == results.scores
    assert run_demo(tmp_path / "other", seed=4).scores != results.scores


def test_a_second_run_goes_on_from_what_is_there(finished: tuple[Path, Results]):
    """Nothing is trained twice: the metrics of every phase stay as they are, and the numbers too."""
    folder, results = finished
    before = {path: path.read_bytes() for path in folder.rglob("metrics.jsonl")}
    assert len(before) == 8

    again = run_demo(folder, seed=3)

    assert again.scores == results.scores
    assert {path: path.read_bytes() for path in folder.rglob("metrics.jsonl")} == before
