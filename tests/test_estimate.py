"""What training will take is known before it starts, and no weight is read for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from tensor_bytes import TensorBytes
from training_helpers import TOKENIZER
from ultrafuser.cli.main import app
from ultrafuser.config.load import parse_recipe
from ultrafuser.config.recipe import Recipe
from ultrafuser.errors import ConfigError, ModelError, UltrafuserError
from ultrafuser.train.estimate.advice import find_remedies, with_settings
from ultrafuser.train.estimate.devices import Devices, parse_devices
from ultrafuser.train.estimate.estimate import (
    Ingredients,
    PhaseEstimate,
    estimate_phases,
    gather_ingredients,
    measure_files,
)
from ultrafuser.train.estimate.run import estimate_recipe
from ultrafuser.train.estimate.shapes import read_shape
from ultrafuser.train.trainer import Trainer

CPU = Devices("cpu", 1, 2**34, {"bf16": 1e10, "fp32": 1e10}, 0.5, is_cpu=True)
TEMPLATES = {"text": "ultralm", "code": "codellama", "math": "wizardmath"}
LLAMA_13B = {
    "model_type": "llama",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Three Llamas of 13 billion parameters of which there is a config.json each, and nothing else."""
    folder = tmp_path_factory.mktemp("paper")
    for name in TEMPLATES:
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(LLAMA_13B), encoding="utf-8")
    return parse_recipe(
        {
            "name": "paper",
            "specialists": {name: {"model": str(folder / name), "template": t} for name, t in TEMPLATES.items()},
            "data": {"domains": {name: {"sources": [{"path": f"{name}.jsonl"}]} for name in TEMPLATES}},
            "train": {"precision": "bf16", "activation_checkpointing": True, "micro_batch_tokens": 8192},
            "stage2": {"steps": 5000, "records_per_domain": 32, "train_specialists": True},
        }
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Two Llamas large enough that tensors are what takes memory, with records of different lengths."""
    folder = tmp_path_factory.mktemp("small")
    for seed, name in enumerate(("text", "code")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(TOKENIZER),
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=name == "code",
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
        lines = [json.dumps({"prompt": f"{name} {i}?", "response": f"It is {i}. " * (3 + i % 4)}) for i in range(40)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    stage = {"steps": 2, "records_per_domain": 6}
    return parse_recipe(
        {
            "name": "small",
            "specialists": {
                name: {"model": str(folder / name), "template": TEMPLATES[name]} for name in ("text", "code")
            },
            "gate": {"hidden_size": 32},
            "data": {
                "domains": {name: {"sources": [{"path": str(folder / f"{name}.jsonl")}]} for name in ("text", "code")}
            },
            "train": {"micro_batch_tokens": 512, "validation_records": 1, "device": "cpu", "threads": 1},
            "stage1": stage,
            "stage2": {**stage, "train_specialists": True},
        }
    )


@pytest.fixture(scope="module")
def small_ingredients(small: Recipe) -> Ingredients:
    return gather_ingredients(small)


@pytest.fixture(scope="module")
def paper_ingredients(paper: Recipe) -> Ingredients:
    return gather_ingredients(paper, tokens=(100, 400))


def phases_of(recipe: Recipe, devices: str, ingredients: Ingredients) -> dict[str, PhaseEstimate]:
    return {phase.name: phase for phase in estimate_phases(recipe, parse_devices(devices), ingredients)}


def train_watched(recipe: Recipe, phase: str, folder: Path) -> tuple[int, list[dict[str, Any]]]:
    """Bytes of all tensors at the peak of a phase that is really trained, and its lines of metrics."""
    trainer = Trainer(recipe.model_copy(update={"output": folder}))
    model = trainer.build(recipe.specialists)
    stage = getattr(recipe, phase)
    with TensorBytes([*model.parameters(), *model.buffers()]) as watch:
        trainer.run_stage(phase, model, stage)
    lines = (folder / phase / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return watch.peak, [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("phase", "overrides"),
    [
        ("stage1", []),
        ("stage1", ["train.activation_checkpointing=true"]),
        ("stage2", []),
        ("stage2", ["train.activation_checkpointing=true", "train.precision=bf16"]),
    ],
    ids=["stage 1", "stage 1, checkpointing", "stage 2", "stage 2, checkpointing, bf16"],
)
def test_memory_is_that_of_a_run(
    small: Recipe, small_ingredients: Ingredients, phase: str, overrides: list[str], tmp_path: Path
) -> None:
    """Within 10%, every tensor counted; and the tokens of each step are the very ones."""
    recipe = with_settings(small, overrides)
    (expected,) = (e for e in estimate_phases(recipe, CPU, small_ingredients) if e.name == phase)

    measured, lines = train_watched(recipe, phase, tmp_path)

    assert expected.memory.num_bytes == pytest.approx(measured, rel=0.10)
    assert expected.work.responses_per_step == sum(line["tokens"] for line in lines) / len(lines)
    assert expected.work.steps == len(lines)


def test_no_weights_are_needed(paper: Recipe) -> None:
    """A configuration is enough: 13,015,864,320 parameters, as the real Llama-2-13B has."""
    shape = read_shape(paper.specialists["text"], name="text")

    assert shape.num_parameters == 13_015_864_320
    assert shape.num_parameters == shape.layers_parameters + 2 * shape.head_parameters + shape.hidden_size


def test_the_paper_fits_on_sixteen_cards_and_not_on_eight(paper: Recipe, paper_ingredients: Ingredients) -> None:
    """39 billion parameters take 16 bytes each in stage 2, shared out."""
    sixteen = phases_of(paper, "16xA100-80GB", paper_ingredients)
    eight = phases_of(paper, "8xA100-80GB", paper_ingredients)

    assert sixteen["stage1"].fits
    assert sixteen["stage2"].fits
    assert sixteen["stage2"].trained_parameters == 3 * 13_015_864_320 + sixteen["stage1"].trained_parameters
    assert sixteen["stage2"].memory.parts["optimizer"] == pytest.approx(39e9 * 8 / 16, rel=0.01)
    assert eight["stage1"].fits
    assert not eight["stage2"].fits


def test_operations_are_eight_a_parameter_and_token_with_checkpointing_and_six_without(
    paper: Recipe, paper_ingredients: Ingredients
) -> None:
    """Attention and heads come on top of 6ND and 8ND: a few percent of a large model at 500 columns."""
    with_, without = (
        phases_of(with_settings(paper, [f"train.activation_checkpointing={on}"]), "H100", paper_ingredients)
        for on in ("true", "false")
    )

    tokens = 5000 * 96 * 500
    assert with_["stage2"].work.flops == pytest.approx(8 * 39e9 * tokens, rel=0.06)
    assert without["stage2"].work.flops == pytest.approx(6 * 39e9 * tokens, rel=0.06)
    assert with_["stage1"].work.flops == pytest.approx(2 * 39e9 * 400 * 192 * 500, rel=0.06)


def test_every_remedy_makes_the_phase_fit(small: Recipe, small_ingredients: Ingredients) -> None:
    """Each is told alone, and estimated again with it alone the phase fits."""
    needed = {phase.name: phase.needed_bytes for phase in estimate_phases(small, CPU, small_ingredients)}
    tight = replace(CPU, memory_bytes=int(0.9 * needed["stage2"]))
    phase = next(p for p in estimate_phases(small, tight, small_ingredients) if p.name == "stage2")

    remedies = find_remedies(small, tight, small_ingredients, phase)

    assert not phase.fits
    assert "train.activation_checkpointing=true" in remedies
    assert any(remedy.startswith("train.micro_batch_tokens=") for remedy in remedies)
    for remedy in remedies:
        again = estimate_phases(with_settings(small, [remedy]), tight, small_ingredients)
        assert next(p for p in again if p.name == "stage2").fits, remedy


def test_more_devices_are_told_where_they_help(paper: Recipe, paper_ingredients: Ingredients) -> None:
    four = parse_devices("4xA100-80GB")
    phase = phases_of(paper, "4xA100-80GB", paper_ingredients)["stage2"]

    remedies = find_remedies(paper, four, paper_ingredients, phase)

    (more,) = (text.removeprefix("--devices ") for text in remedies if text.startswith("--devices"))
    assert more == "16xA100-80GB"
    assert phases_of(paper, more, paper_ingredients)["stage2"].fits


def test_settings_save_what_they_are_for(paper: Recipe, paper_ingredients: Ingredients) -> None:
    """Adapters leave optimizer states out, the cache holds one specialist, offloading moves to the host."""

    def on(devices: str, *overrides: str) -> dict[str, PhaseEstimate]:
        return phases_of(with_settings(paper, list(overrides)), devices, paper_ingredients)

    whole = on("6xA100-80GB")
    adapters = on("6xA100-80GB", "stage2.lora.rank=16")
    cached = on("A100-40GB", "dtype=bfloat16", "train.stage1_cache.mode=window")
    offloaded = on("6xA100-80GB", "train.parallel.cpu_offload=true")
    split = on("6xA100-80GB", "train.parallel.mode=specialist")

    assert adapters["stage2"].memory.parts["optimizer"] < 0.01 * whole["stage2"].memory.parts["optimizer"]
    assert cached["stage1"].fits
    assert cached["stage1"].memory.parts["weights"] < 2 * 13.1e9 + 3 * 0.33e9
    assert "optimizer" not in offloaded["stage2"].memory.parts
    assert offloaded["stage2"].memory.host_bytes > 1e11
    # Each device holds a half of one specialist, as much as a sixth of three.
    kept, shared = split["stage2"].memory.parts, whole["stage2"].memory.parts
    assert kept["optimizer"] == pytest.approx(shared["optimizer"], rel=0.01)


def test_of_adapters_the_disk_gets_adapters_alone(
    small: Recipe, small_ingredients: Ingredients, tmp_path: Path
) -> None:
    """A fused model with adapters keeps no copy of the weights below; here beside a run that is really done."""
    recipe = with_settings(small, ["stage2.lora.rank=2"]).model_copy(update={"output": tmp_path / "run"})
    expected = measure_files(recipe, gather_ingredients(recipe)).model

    target = Trainer(recipe).run()

    tensors = [tensor for path in target.rglob("*.safetensors") for tensor in load_file(path).values()]
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == pytest.approx(expected, rel=0.1)
    assert expected < 0.5 * measure_files(small, small_ingredients).model


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"devices": "16xTPU"}, "16xA100-80GB; known are"),
        ({"devices": "0xA100-80GB"}, "known are"),
        ({"devices": "H100", "tokens": "500"}, "write PROMPT+RESPONSE"),
        ({"devices": "H100", "tokens": "100+9000"}, "over data.max_length 2048"),
        ({"devices": "H100", "tokens": "1+1", "utilisation": 40.0}, "above 0 and at most 1"),
    ],
    ids=["device", "none", "tokens", "too long", "utilisation"],
)
def test_bad_options_are_one_line(paper: Recipe, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UltrafuserError, match=words.replace("+", r"\+")) as caught:
        estimate_recipe(paper, **options)

    assert "\n" not in str(caught.value)


def test_a_folder_that_is_missing_is_named(paper: Recipe, tmp_path: Path) -> None:
    recipe = with_settings(paper, [f"specialists.code.model={tmp_path / 'nothing'}"])

    with pytest.raises(ModelError, match=r"'code': there is no folder .*nothing; give one that holds its config"):
        estimate_recipe(recipe, devices="H100", tokens="100+400")


def test_a_hub_that_cannot_be_reached_is_one_line(paper: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says how to go on without it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    recipe = with_settings(paper, ["specialists.code.model=somebody/something-that-nobody-cached"])

    with pytest.raises(ModelError, match=r"--set specialists\.code\.model=FOLDER"):
        estimate_recipe(recipe, devices="H100", tokens="100+400")


def test_specialist_mode_refuses_devices_that_cannot_be_shared_out(paper: Recipe) -> None:
    with pytest.raises(ConfigError, match="equally many processes"):
        estimate_recipe(
            with_settings(paper, ["train.parallel.mode=specialist"]), devices="16xA100-80GB", tokens="100+400"
        )


def test_devices_are_read_as_people_write_them() -> None:
    assert parse_devices("16xA100-80GB").count == 16
    assert parse_devices("a100-40gb").memory_bytes < parse_devices("A100").memory_bytes
    assert parse_devices("2 x RTX-4090", utilisation=0.3).utilisation == 0.3


@pytest.fixture
def recipe_file(paper: Recipe, tmp_path: Path) -> Path:
    path = tmp_path / "paper.yaml"
    path.write_text(json.dumps(paper.model_dump(mode="json")), encoding="utf-8")
    return path


def test_the_command_shows_a_table_and_writes_json(recipe_file: Path, tmp_path: Path) -> None:
    """Exit code 1 where something does not fit."""
    wanted = ["train", str(recipe_file), "--dry-run", "--tokens", "100+400", "--json", str(tmp_path / "out.json")]

    fits, tight = (CliRunner().invoke(app, [*wanted, "--devices", name]) for name in ("16xA100-80GB", "RTX-4090"))

    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert fits.exit_code == 0
    assert "everything fits" in fits.stdout
    assert tight.exit_code == 1
    assert "stage2 is" in tight.stdout
    assert content["fits"] is False
    assert content["phases"][1]["needed_bytes"] > content["devices"]["memory_bytes"]
    assert not (tmp_path / "runs").exists()


def test_of_several_processes_one_tells(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")

    result = CliRunner().invoke(
        app, ["train", str(recipe_file), "--dry-run", "--tokens", "100+400", "--devices", "16xA100-80GB"]
    )

    assert result.exit_code == 0
    assert result.stdout == ""


def test_options_of_a_dry_run_alone_are_refused(recipe_file: Path) -> None:
    result = CliRunner().invoke(app, ["train", str(recipe_file), "--devices", "H100"])

    assert isinstance(result.exception, ConfigError)
    assert "--devices is for --dry-run" in str(result.exception)
