"""Training of adapters: stage 2 and tuning through peft, on frozen weights of their own or of one base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import save_specialist
from training_helpers import TOKENIZER, changed, make_fused, make_phase, make_specialist, parameters, write_ingredients
from ultrafuser.config.load import load_recipe
from ultrafuser.config.training import LoraConfig
from ultrafuser.errors import ConfigError, ModelError, UltrafuserError
from ultrafuser.model.checkpoint import save_fused
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.lora import is_adapter
from ultrafuser.train.adapters import give_adapters, refuse_several_processes
from ultrafuser.train.loop import Loop
from ultrafuser.train.trainer import Trainer

pytest.importorskip("peft")

LORA = {"rank": 2, "alpha": 4}


def write_recipe(folder: Path, **changes: Any) -> Path:
    """Two specialists tuned as adapters of one base, fused over it, stage 2 on the adapters."""
    path = write_ingredients(folder)
    save_specialist(make_specialist(0), folder / "base", tokenizer=TOKENIZER)
    recipe = json.loads(path.read_text(encoding="utf-8"))
    tune = {**recipe["specialists"]["text"]["tune"], "lora": LORA}
    recipe["specialists"] = {
        "text": {"model": "base", "template": "ultralm", "tune": {**tune, "domains": ["text"]}},
        "code": {"model": "base", "template": "codellama", "tune": {**tune, "domains": ["code"]}},
    }
    recipe |= {"shared_base": True, "stage2": {**recipe["stage2"], "lora": LORA}, **changes}
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def test_a_stage_with_adapters_trains_them_and_the_gate_alone(tmp_path: Path):
    model = make_fused().to(torch.bfloat16)
    model.fusion_gate.float()
    give_adapters(model, LoraConfig.model_validate(LORA), seed=1)
    assert {p.dtype for name, p in model.named_parameters() if is_adapter(name)} == {torch.float32}
    before = parameters(model)

    Loop(make_phase(tmp_path, model=model, name="stage2", stage={"train_specialists": True, "lora": LORA})).run()

    touched = changed(before, model)
    assert all(is_adapter(name) or name.startswith("fusion_gate.") for name in touched)
    assert {name.split(".")[1] for name in touched if is_adapter(name)} == set(model.names)


def test_new_adapters_change_nothing_and_depend_on_the_seed_alone():
    plain, one, other = make_fused(), make_fused(), make_fused()
    for model in (one, other):
        torch.rand(3)
        give_adapters(model, LoraConfig.model_validate(LORA), seed=1)
    ids = torch.arange(5, 15)[None]

    torch.testing.assert_close(one(ids).logits, plain(ids).logits)
    assert not changed(parameters(one), other)


def test_a_recipe_makes_specialists_of_one_base_and_fuses_them(tmp_path: Path):
    path = write_recipe(tmp_path)
    base = (tmp_path / "base" / "model.safetensors").read_bytes()

    folder = Trainer(load_recipe(path)).run()

    run_folder = tmp_path / "run"
    settings = json.loads((run_folder / "specialists" / "text" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == base
    assert not list(folder.rglob("model.safetensors"))
    model = FusedForCausalLM.from_pretrained(folder)
    assert model.config.shared_base
    assert model.runs_jointly
    assert {name for name, p in model.named_parameters() if is_adapter(name) and "lora_B" in name and p.any()}
    # The second run finds all of it done, and makes the same.
    Trainer(load_recipe(path)).run()
    assert not changed(parameters(model), FusedForCausalLM.from_pretrained(folder))


def test_a_killed_stage_of_adapters_goes_on_where_it_was(tmp_path: Path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    stage = {"train_specialists": True, "lora": LORA}

    def phase(folder: Path) -> Any:
        model = make_fused(dropout=0.2)
        give_adapters(model, LoraConfig.model_validate(LORA), seed=1)
        return make_phase(folder, model=model, name="stage2", stage=stage)

    one, first = phase(whole), phase(cut)
    Loop(one).run()
    loop = Loop(first)
    step = loop._step

    def interrupted(number: int) -> dict[str, Any]:
        if number == 3:
            raise KeyboardInterrupt
        return step(number)

    loop._step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    again = phase(cut)
    Loop(again).run()

    assert not changed(parameters(one.model), again.model)


def test_adapters_of_different_specialists_are_saved_with_the_gate_alone(tmp_path: Path):
    path = write_ingredients(tmp_path)
    overrides = ["stage2.lora.rank=2", "specialists.text.tune=null"]

    folder = Trainer(load_recipe(path, overrides)).run()

    assert not list(folder.rglob("model.safetensors"))
    assert {part.name for part in (folder / "adapters").iterdir()} == {"text", "code"}
    model = FusedForCausalLM.from_pretrained(folder)
    save_fused(model, tmp_path / "again", gate_only=True)
    assert not changed(parameters(model), FusedForCausalLM.from_pretrained(tmp_path / "again"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stage2.lora=null"], "stage2 needs lora"),
        (["specialists.text.tune.lora=null"], "specialists.text.tune needs lora"),
        (["stage1.lora.rank=2"], "stage1.train_specialists is false"),
        (["train.stage1_cache.mode=window"], "stage1_cache holds one at a time"),
        (["stage2.lora.targets=[lm_head]"], "changes the head 'lm_head'"),
        (["stage2.lora.targets=[nowhere]"], "nowhere"),
        (["specialists.code.model=text-base"], "'text' and 'code' have different bases"),
    ],
    ids=str,
)
def test_a_recipe_that_adapters_cannot_serve_is_refused_before_anything_loads(
    tmp_path: Path, overrides: list[str], said: str, monkeypatch: pytest.MonkeyPatch
):
    path = write_recipe(tmp_path)
    monkeypatch.setattr(Trainer, "build", lambda *_: pytest.fail("weights were read"))

    with pytest.raises(UltrafuserError, match=said) as caught:
        Trainer(load_recipe(path, overrides)).run()

    assert isinstance(caught.value, (ConfigError, ModelError))
    assert "\n" not in str(caught.value).strip()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["shared_base=false", "train.parallel.mode=specialist"],
            r"stage2\.lora does not go with train.parallel.mode: specialist",
        ),
        (["shared_base=true"], "shared_base: true is for one process, and there are 2"),
    ],
)
def test_what_several_processes_cannot_adapt_is_refused(tmp_path: Path, overrides: list[str], said: str):
    with pytest.raises(ConfigError, match=said):
        refuse_several_processes(load_recipe(write_recipe(tmp_path), overrides), num_processes=2)
