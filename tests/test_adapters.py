"""Adapters: saved beside the gate, loaded again, merged, refused before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers import make_fused, make_model, save_specialist
from test_shared_base import NAMES, make_shared, make_views
from ultrafuser.errors import ModelError
from ultrafuser.model import specialist as specialist_module
from ultrafuser.model.checkpoint import save_fused
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.lora import Adapter, add_adapter, write_adapter
from ultrafuser.model.shared_base import share_base

peft = pytest.importorskip("peft")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a model's weights is an error."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(specialist_module.AutoModelForCausalLM, "from_pretrained", refuse)


def write_family(folder: Path, *, ranks: tuple[int, ...] = (2, 3)) -> dict[str, Path]:
    """A base and random adapters of it, as folders."""
    base = make_model("llama", seed=0, tied=True)
    save_specialist(base, folder / "base")
    places = {}
    for number, rank in enumerate(ranks):
        torch.manual_seed(number)
        config = peft.LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
        adapted = share_base(base, {"x": Adapter(config)})["x"]
        places[NAMES[number]] = folder / f"adapter-{NAMES[number]}"
        write_adapter(adapted, places[NAMES[number]], base=str(folder / "base"))
    return places


def same_answers(model: FusedForCausalLM, other: FusedForCausalLM, **tolerance: float) -> None:
    batch = make_views(model)
    for mine, theirs in zip(model.response_nll(**batch), other.response_nll(**batch), strict=True):
        torch.testing.assert_close(mine, theirs, **(tolerance or {"atol": 0, "rtol": 0}))


def test_a_shared_base_is_built_from_folders_and_equals_the_merged_specialists(tmp_path: Path):
    places = write_family(tmp_path)

    shared = FusedForCausalLM.from_specialists(places, shared_base=True, gate_hidden_size=8)
    separate = FusedForCausalLM.from_specialists(places, gate_hidden_size=8)

    assert shared.runs_jointly
    same_answers(shared, separate, atol=1e-5, rtol=1e-5)


def test_the_whole_model_is_saved_with_its_base_once(tmp_path: Path):
    model = make_shared()

    save_fused(model, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")

    assert loaded.config.shared_base
    assert loaded.runs_jointly
    assert {path.name for path in (tmp_path / "model" / "adapters").iterdir()} == set(NAMES)
    assert len(list((tmp_path / "model").rglob("model.safetensors"))) == 1
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    assert parameters == sum(parameter.numel() for parameter in model.parameters())
    same_answers(loaded, model)
    moved = (tmp_path / "model").rename(tmp_path / "moved")
    same_answers(FusedForCausalLM.from_pretrained(moved), model)


def test_gate_and_adapters_alone_refer_to_the_base(tmp_path: Path):
    model = FusedForCausalLM.from_specialists(write_family(tmp_path), shared_base=True, gate_hidden_size=8)

    save_fused(model, tmp_path / "model", gate_only=True)

    assert not list((tmp_path / "model").rglob("model.safetensors"))
    same_answers(FusedForCausalLM.from_pretrained(tmp_path / "model"), model)
    smaller = FusedForCausalLM.from_pretrained(tmp_path / "model", without=["text"])
    assert smaller.names == ["code"]
    half = FusedForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert {p.dtype for p in half.specialists.parameters()} == {torch.bfloat16}


def test_adapters_over_different_specialists_are_saved_with_the_gate(tmp_path: Path):
    folders = {name: save_specialist(make_model("llama", seed=j), tmp_path / name) for j, name in enumerate(NAMES)}
    model = FusedForCausalLM.from_specialists(folders, gate_hidden_size=8)
    for specialist in model.specialists.values():
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        add_adapter(specialist, Adapter(config), name="x")

    for gate_only in (True, False):
        save_fused(model, tmp_path / "model", gate_only=gate_only)
        same_answers(FusedForCausalLM.from_pretrained(tmp_path / "model"), model)


@pytest.mark.usefixtures("no_weights")
def test_a_changed_adapter_is_refused(tmp_path: Path):
    save_fused(make_shared(), tmp_path / "model")
    file = tmp_path / "model" / "adapters" / "code" / "adapter_model.safetensors"
    state = load_file(file)
    save_file({key: value + 1 for key, value in state.items()}, file)

    with pytest.raises(ModelError, match=r"adapter of specialist 'code' .* is not the one that was saved"):
        FusedForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.usefixtures("no_weights")
def test_an_adapter_of_another_base_is_refused_before_any_weight_loads(tmp_path: Path):
    places = write_family(tmp_path)
    wide = make_model("llama", hidden_size=32)
    save_specialist(wide, tmp_path / "wide" / "base")
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    adapted = add_adapter(wide, Adapter(config), name="wide")
    write_adapter(adapted, tmp_path / "other", base=str(tmp_path / "wide" / "base"))

    with pytest.raises(ModelError, match="'text' and 'wide' have different bases"):
        FusedForCausalLM.from_specialists({**places, "wide": tmp_path / "other"}, shared_base=True)

    # One that names the right base and has other shapes.
    write_adapter(adapted, tmp_path / "other", base=str(tmp_path / "base"))
    with pytest.raises(ModelError, match=r"should be .* but is .* belongs to another base"):
        FusedForCausalLM.from_specialists({**places, "wide": tmp_path / "other"}, shared_base=True)


def test_an_adapter_of_the_head_is_refused():
    base = make_model("llama")

    with pytest.raises(ModelError, match="changes the head 'lm_head'"):
        share_base(base, {"text": Adapter(peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))})


@pytest.mark.parametrize("field", [{"use_dora": True}, {"modules_to_save": ["norm"]}, {"bias": "all"}], ids=str)
def test_an_adapter_that_changes_more_is_refused(tmp_path: Path, field: dict[str, Any]):
    places = write_family(tmp_path)
    file = places["code"] / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **field}))

    with pytest.raises(ModelError, match=f"uses {next(iter(field))}"):
        FusedForCausalLM.from_specialists(places, shared_base=True)


def test_models_that_share_nothing_are_no_shared_base():
    with pytest.raises(Exception, match="of its own"):
        make_fused(shared_base=True)
