"""A group of processes for each specialist trains what one process trains."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from specialist_ranks import CASES, IRRELEVANT, NAMES, STAGES, stage_phase, write_recipe
from training_helpers import parameters, untimed_metrics
from ultrafuser.config.load import load_recipe
from ultrafuser.errors import ConfigError
from ultrafuser.train.checkpoint import read_newest
from ultrafuser.train.loop import Loop
from ultrafuser.train.parallel.check import check_specialist_mode
from ultrafuser.train.pipeline import train

SIZES = (3, 6)
JOBS = (*map(str, SIZES), "recipe:4", "recipe:3", "bench:3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What one process and 3 and 6 of them leave of both stages, in a folder for each number."""
    folder = tmp_path_factory.mktemp("specialist")
    for size in (1, *SIZES):
        for stage in STAGES:
            (folder / str(size) / stage).mkdir(parents=True)
    recipe = write_recipe(folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.fspath(Path("src").resolve())}
    command = [sys.executable, os.fspath(Path(__file__).parent / "specialist_ranks.py"), str(folder), *JOBS]
    ranks = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        for stage in STAGES:
            Loop(stage_phase(folder / "1", stage)).run()
        train(load_recipe(recipe, [f"output={folder}/one"]))
        _, said = ranks.communicate(timeout=600)
    finally:
        ranks.kill()
    assert ranks.returncode == 0, said
    yield folder
    shutil.rmtree(folder)


def found(folder: Path, job: str) -> list[dict[str, Any]]:
    """What each process said."""
    size = int(job.split(":")[-1])
    return [json.loads((folder / f"found-{job}-{rank}.json").read_text()) for rank in range(size)]


@pytest.mark.parametrize("case", list(CASES))
def test_loss_and_every_gradient_are_those_of_one_process(folder: Path, case: str):
    for said in found(folder, "3"):
        assert said["compare"][case]["worst"] < 1e-5
        assert said["compare"][case]["gradients"] > 0


@pytest.mark.parametrize("stage", list(STAGES))
@pytest.mark.parametrize("size", SIZES)
def test_steps_are_those_of_one_process(folder: Path, size: int, stage: str):
    """Losses, gate weights and gradient norms, and the trained parameters joined from all processes' checkpoints."""
    metrics, expected = (untimed_metrics(folder / str(n) / stage / "metrics.jsonl") for n in (size, 1))

    assert len(metrics) == len(expected) == 4
    for line, other in zip(metrics, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert line.get("validation", {}) == pytest.approx(other.get("validation", {}), rel=1e-4)
        for domain, weights in line["gate_weights"].items():
            assert weights == pytest.approx(other["gate_weights"][domain], rel=1e-4)
    trained, others = (read_newest(folder / str(n) / stage / "checkpoints") for n in (size, 1))
    assert trained is not None
    assert others is not None
    assert trained.parameters.keys() == others.parameters.keys()
    for name in trained.parameters.keys() - {IRRELEVANT}:
        torch.testing.assert_close(trained.parameters[name], others.parameters[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("size", SIZES)
def test_each_process_holds_one_specialist_and_the_same_gate(folder: Path, size: int):
    said = found(folder, str(size))

    for stage in STAGES:
        assert len({one[stage]["gate"] for one in said}) == 1
    held = [one["stage2"]["held"] for one in said]
    assert held == [[name] for name in NAMES for _ in range(size // len(NAMES))]
    model = stage_phase(folder, "stage2").model
    for said_one, name in zip(said, [name for names in held for name in names], strict=True):
        parts = [*model.specialists[name].parameters(), *model.fusion_gate.parameters()]
        most = 1.05 * sum(part.numel() for part in parts) / (size // len(NAMES))  # parts of odd sizes are not equal
        assert said_one["stage2"]["elements"] <= most


@pytest.mark.parametrize("size", SIZES)
def test_one_process_goes_on_from_their_checkpoint(folder: Path, size: int, tmp_path: Path):
    source = folder / str(size) / "stage2" / "checkpoints" / "step-00000002"
    shutil.copytree(source, tmp_path / "stage2" / "checkpoints" / source.name)

    phase = stage_phase(tmp_path, "stage2")
    Loop(phase).run()

    assert [line["step"] for line in untimed_metrics(tmp_path / "stage2" / "metrics.jsonl")] == [2, 3]
    expected = read_newest(folder / "1" / "stage2" / "checkpoints")
    assert expected is not None
    for name, value in parameters(phase.model).items():
        if name in expected.parameters and name != IRRELEVANT:
            torch.testing.assert_close(value, expected.parameters[name], rtol=1e-4, atol=2e-5)


def test_a_recipe_gives_the_model_of_one_process(folder: Path):
    """One specialist is fine-tuned first, by all processes; then both stages, and the model is saved whole."""
    assert [said["refused"] for said in found(folder, "recipe:3")] == [None] * 3
    several, one = (load_file(folder / run / "model" / "model.safetensors") for run in ("several-3", "one"))

    assert several.keys() == one.keys()
    for name in several.keys() - {IRRELEVANT}:
        torch.testing.assert_close(several[name], one[name], rtol=1e-3, atol=2e-4)


def test_a_number_of_processes_that_does_not_fit_is_refused_by_all_in_one_line(folder: Path):
    messages = [said["refused"] for said in found(folder, "recipe:4")]

    assert sum("of the 3 specialists, and there are 4: start 3 or 6" in message for message in messages) == 4
    assert not any("\n" in message for message in messages)
    assert not (folder / "several-4").exists()


def test_what_collectives_are_handed_is_what_the_arithmetic_of_the_benchmark_says(folder: Path):
    for said in found(folder, "bench:3"):
        for mode in ("fsdp", "specialist"):
            assert said[mode]["counted_bytes"] == pytest.approx(said[mode]["paper"]["total"], rel=0.02)
        assert said["specialist"]["losses"] == pytest.approx(said["fsdp"]["losses"], rel=1e-5)
        assert said["specialist"]["counted_bytes"] < said["fsdp"]["counted_bytes"]


@pytest.mark.parametrize(
    ("settings", "num_processes", "problem"),
    [
        ([], 1, "there is 1: start 3 "),
        ([], 2, "there are 2: start 3 "),
        ([], 8, "there are 8: start 6 or 9"),
        (["fusion.space=probs"], 3, "cannot go with fusion.space: probs"),
        (["train.stage1_cache.mode=window"], 3, "cannot go with train.stage1_cache.mode: window"),
        (["train.loss_backend=torch"], 3, "cannot go with train.loss_backend: torch"),
        (["stage2.lora.rank=4"], 3, "cannot go with stage2.lora: "),
        (["train.parallel.cpu_offload=true"], 3, "cannot go with train.parallel.cpu_offload: True"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_weight_is_read(
    tmp_path: Path, settings: list[str], num_processes: int, problem: str
):
    recipe = load_recipe(write_recipe(tmp_path), ["train.parallel.mode=specialist", *settings])
    for weights in tmp_path.glob("*-base/*.safetensors"):
        weights.unlink()

    with pytest.raises(ConfigError, match=re.escape(problem)) as caught:
        check_specialist_mode(recipe, num_processes=num_processes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("math", {"num_hidden_layers": 4}, "'math' has 14,528 parameters and 'text' 9,344"),
        ("code", {"hidden_size": 8, "head_dim": 4}, "and 'code' "),
        ("text", {"model_type": "gemma2", "final_logit_softcapping": 30.0}, "the head of specialist 'text'"),
    ],
)
def test_specialists_that_do_not_fit_are_named(tmp_path: Path, name: str, change: dict[str, Any], problem: str):
    recipe = load_recipe(write_recipe(tmp_path), ["train.parallel.mode=specialist"])
    check_specialist_mode(recipe, num_processes=3)
    config = tmp_path / f"{name}-base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change), encoding="utf-8")

    with pytest.raises(ConfigError, match=problem):
        check_specialist_mode(recipe, num_processes=3)


def test_one_specialist_alone_is_refused(tmp_path: Path):
    recipe = load_recipe(write_recipe(tmp_path), ["train.parallel.mode=specialist"])
    alone = recipe.model_copy(update={"specialists": {"text": recipe.specialists["text"]}})

    with pytest.raises(ConfigError, match="the recipe has 'text' alone: set mode: fsdp"):
        check_specialist_mode(alone, num_processes=3)
