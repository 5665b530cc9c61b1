"""The fused loss in training: the losses that the general way gives, by every back end, sharded or not."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from training_helpers import make_fused, make_phase, parameters, untimed_metrics, write_ingredients
from ultrafuser.config.load import load_recipe
from ultrafuser.errors import ModelError
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.train.loop import Loop
from ultrafuser.train.trainer import Trainer

STAGES: dict[str, dict[str, Any]] = {"stage1": {}, "stage2": {"train_specialists": True}}


def train(folder: Path, stage: str, **options: Any) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Metrics and trained parameters of four steps."""
    folder.mkdir()
    phase = make_phase(folder, model=make_fused(), name=stage, stage=STAGES[stage], train=options)
    Loop(phase).run()
    return untimed_metrics(folder / "metrics.jsonl"), parameters(phase.model)


@pytest.mark.parametrize("stage", list(STAGES))
@pytest.mark.parametrize("options", [{}, {"loss_backend": "torch"}, {"loss_chunk": 3}])
def test_training_gives_the_losses_of_the_general_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, options: dict[str, Any]
):
    metrics, trained = train(tmp_path / "fast", stage, **options)

    monkeypatch.setattr(FusedForCausalLM, "loss_head", lambda self, name: partial(self.head, name))
    expected, others = train(tmp_path / "general", stage)
    assert len(metrics) == len(expected) == 4
    for line, other in zip(metrics, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    # The last bias of the gate moves all scores alike: its gradient is rounding, which Adam makes as large as any.
    for name in trained.keys() - {"fusion_gate.layers.2.bias"}:
        torch.testing.assert_close(trained[name], others[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stage", list(STAGES))
def test_under_bf16_the_losses_are_those_of_the_general_way_to_bf16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
):
    metrics, _ = train(tmp_path / "fast", stage, precision="bf16")

    monkeypatch.setattr(FusedForCausalLM, "loss_head", lambda self, name: partial(self.head, name))
    expected, _ = train(tmp_path / "general", stage, precision="bf16")
    for line, other in zip(metrics, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=2e-3)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-2)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["train.loss_backend=liger"], "liger runs on a GPU"),
        (["train.loss_backend=torch", "fusion.space=probs"], "in the space logits alone, not probs"),
    ],
)
def test_a_loss_back_end_that_cannot_run_is_refused_before_any_model_is_read(
    tmp_path: Path, settings: list[str], problem: str
):
    recipe = load_recipe(write_ingredients(tmp_path), settings)
    for folder in tmp_path.glob("*-base"):
        (folder / "config.json").write_text("not read", encoding="utf-8")

    with pytest.raises(ModelError, match=problem):
        Trainer(recipe)


@pytest.mark.parametrize("is_fast", [True, False])
def test_bf16_on_a_processor_that_is_slow_at_it_is_told_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_fast: bool
):
    monkeypatch.setattr("ultrafuser.train.trainer.multiplies_bf16", lambda _: is_fast)
    recipe = write_ingredients(tmp_path)
    Trainer(load_recipe(recipe, ["train.precision=fp32"]))
    assert "bf16" not in caplog.text
    Trainer(load_recipe(recipe, ["train.precision=bf16"]))
    assert ("no instructions for bf16" in caplog.text) is not is_fast


@pytest.mark.slow
def test_sharded_heads_give_the_gradients_of_whole_ones(tmp_path: Path):
    """FSDP2 on two processes with tied heads in the root: called inside its forward, the loss sees whole heads."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{Path('src').resolve()}"}
    script = Path(__file__).parent / "fsdp_loss_ranks.py"
    command = [sys.executable, str(script)]
    ranks = [subprocess.Popen([*command, str(rank), "2", str(tmp_path)], env=environment) for rank in range(2)]

    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    for rank in range(2):
        for stage, found in json.loads((tmp_path / f"found-{rank}.json").read_text()).items():
            assert found["sharded"].keys() == found["alone"].keys()
            assert (len(found["alone"]) > 5) == (stage == "stage2")
            for name, values in found["sharded"].items():
                assert values == pytest.approx(found["alone"][name], rel=1e-4, abs=1e-5), (stage, name)
