"""Plain `transformers.Trainer` trains the fused model to where our own loop trains it (examples/hf_trainer.py)."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from training_helpers import make_fused, make_phase, parameters, untimed_metrics, write_ingredients
from ultrafuser.alignment.collate import collate
from ultrafuser.data.drawn import DrawnRecords
from ultrafuser.data.sampler import Sampler
from ultrafuser.errors import ConfigError
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.train.loop import Loop

EXAMPLE = Path(__file__).parent.parent / "examples" / "hf_trainer.py"
UNSEEN = "fusion_gate.layers.2.bias"  # adds the same to every score: its gradient is rounding, its steps are noise
STAGES = {"stage1": {"train_specialists": False}, "stage2": {"train_specialists": True}}


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("hf_trainer", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_our_loop(folder: Path, stage: dict[str, Any]) -> tuple[list[float], FusedForCausalLM]:
    phase = make_phase(folder, stage=stage)
    Loop(phase).run()
    return [line["loss"] for line in untimed_metrics(folder / "metrics.jsonl")], phase.model


def by_trainer(example: Any, folder: Path, stage: dict[str, Any], pieces: int) -> tuple[list[float], Any]:
    phase = make_phase(folder, stage=stage)
    trainer = example.make_trainer(
        phase.model,
        phase.records,
        phase.stage,
        folder,
        pad_id=phase.encoder.pad_id,
        seed=phase.seed,
        pieces=pieces,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], trainer


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_the_loss_curve_and_the_model_are_those_of_our_loop_in_one_piece_and_in_four(
    tmp_path: Path, example: Any, stage: dict[str, Any]
):
    """Losses to fp32 rounding; weights, which AdamW moves by 1e-2 a step whatever their gradient, to 1e-4."""
    ours, model = by_our_loop(tmp_path / "ours", stage)
    assert len(set(ours)) == 4

    for pieces in (1, 4):
        losses, trainer = by_trainer(example, tmp_path / f"pieces-{pieces}", stage, pieces)

        assert losses == pytest.approx(ours, rel=2e-6)
        trained = parameters(trainer.model)
        for name, value in parameters(model).items():
            if name != UNSEEN:
                torch.testing.assert_close(trained[name], value, atol=1e-4, rtol=1e-4, msg=name)


def test_what_the_trainer_saves_is_loaded_as_it_was(tmp_path: Path, example: Any):
    _, trainer = by_trainer(example, tmp_path, STAGES["stage2"], 1)

    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert type(loaded) is FusedForCausalLM
    for name, value in parameters(trainer.model).items():
        assert torch.equal(parameters(loaded)[name], value), name
    phase = make_phase(tmp_path / "again", model=loaded)
    batch = collate(phase.records["text"], pad_id=phase.encoder.pad_id).tensors()
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).loss, trainer.model(**batch).loss)


def test_a_loss_is_divided_by_the_tokens_of_the_whole_batch_and_not_by_pieces():
    """What goes wrong where a model hides whether it takes num_items_in_batch: gradients as many times too large."""
    model = make_fused()
    phase = make_phase(Path("unused"), model=model)
    records = [record for some in phase.records.values() for record in some]
    total = sum(record.num_response_tokens for record in records)
    assert model.accepts_loss_kwargs is True

    def loss(some: list[Any]) -> torch.Tensor:
        return model(**collate(some, pad_id=phase.encoder.pad_id).tensors(), num_items_in_batch=total).loss

    with torch.no_grad():
        torch.testing.assert_close(loss(records[:3]) + loss(records[3:]), loss(records))


def test_records_are_drawn_as_our_loop_draws_them(tmp_path: Path):
    phase = make_phase(tmp_path)
    loop = Loop(phase)

    drawn = DrawnRecords(phase.records, loop.sampler, steps=4)

    for step in range(4):
        ours = [loop._record(draw).id for draw in loop.sampler.batch(step)]
        assert [drawn[step * drawn.batch_size + i].id for i in range(drawn.batch_size)] == ours
    assert len(list(drawn)) == len(drawn) == 16
    composed = Sampler({"text": 6, "code": 5}, records_per_domain=2, seed=0, composed_share=0.5)
    with pytest.raises(ConfigError, match="set composed_share to 0"):
        DrawnRecords(phase.records, composed, steps=4)


@pytest.mark.parametrize(("several", "number"), [("world_size", 2), ("n_gpu", 4)])
def test_several_processes_or_gpus_are_refused(
    tmp_path: Path, example: Any, monkeypatch: pytest.MonkeyPatch, several: str, number: int
):
    """Each would be dealt whole batches of its own, so a step would see as many times more records than it should."""
    monkeypatch.setattr(TrainingArguments, several, property(lambda _: number))

    with pytest.raises(SystemExit, match=rf"{4 * number} records in a step instead of 4: .* ultrafuser train"):
        by_trainer(example, tmp_path, STAGES["stage1"], 1)


def test_the_example_trains_a_stage_of_a_recipe(tmp_path: Path, example: Any, monkeypatch: pytest.MonkeyPatch):
    recipe = write_ingredients(tmp_path)
    overrides = ["stage1.composed_share=0", "specialists.text.tune=null", "stage1.steps=2"]
    sets = [part for override in overrides for part in ("--set", override)]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(recipe), str(tmp_path / "out"), "--pieces", "2", *sets])

    example.main()

    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "ultrafuser"
