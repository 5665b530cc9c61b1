"""Full fine-tunes as base and adapters: ranks by energy and room, what is refused, and the way back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

from helpers import make_fused, make_model, make_tokenizer, save_specialist
from test_adapters import same_answers
from ultrafuser.cli.main import app
from ultrafuser.errors import ConfigError, ModelError
from ultrafuser.export import adapters as exporting
from ultrafuser.export.adapters import extract_fused, extract_specialists, merge_adapters, save_merged
from ultrafuser.model.checkpoint import save_fused
from ultrafuser.model.extraction import check_family, choose_ranks, extract_adapter, measure_difference
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.lora import merge_adapter
from ultrafuser.model.shared_base import share_base

pytest.importorskip("peft")


def make_tuned(base: PreTrainedModel, *, seed: int, rank: int = 2, norms: float = 0.0) -> PreTrainedModel:
    """A fine-tune whose linear layers below the head changed by a matrix of low rank, and its norms a little."""
    tuned = copy.deepcopy(base)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if weight.dim() == 2 and ("_proj" in name or "c_" in name):
                weight += 0.02 * torch.randn(weight.shape[0], rank) @ torch.randn(rank, weight.shape[1])
            elif "norm" in name or "ln_" in name:
                weight += norms
    return tuned


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_difference_of_low_rank_is_extracted_whole(kind: str):
    base = make_model(kind, tied=True)
    tuned = make_tuned(base, seed=1)

    difference = measure_difference(base, tuned, name="text", max_rank=8)
    extract = extract_adapter(difference, choose_ranks({"text": difference}, energy=0.9999, room=10**6)["text"])

    assert set(extract.ranks.values()) == {2}
    assert extract.kept > 0.9999
    assert extract.lost == 0
    merged = merge_adapter(share_base(base, {"text": extract.adapter})["text"])
    for (name, weight), (_, expected) in zip(merged.named_parameters(), tuned.named_parameters(), strict=True):
        torch.testing.assert_close(weight, expected, atol=2e-3, rtol=1e-3, msg=name)


def test_ranks_go_where_a_parameter_keeps_most():
    base = make_model("llama")
    differences = {
        name: measure_difference(base, make_tuned(base, seed=seed, rank=8), name=name, max_rank=8)
        for seed, name in enumerate(("text", "code"))
    }
    room = 2000

    ranks = choose_ranks(differences, energy=1.0, room=room)

    taken, left = [], []
    for name, difference in differences.items():
        for place, layer in difference.layers.items():
            worth = (layer.values.square() / layer.cost).tolist()
            rank = ranks[name].get(place, 0)
            taken += worth[:rank]
            left += worth[rank:]
    assert min(taken) >= max(left)
    used = sum(differences[n].layers[p].cost * r for n, own in ranks.items() for p, r in own.items())
    assert room - max(layer.cost for layer in differences["text"].layers.values()) < used <= room
    half = choose_ranks(differences, energy=0.5, room=10**6)
    kept = sum(extract_adapter(differences[n], half[n]).kept * differences[n].energy for n in differences)
    assert 0.5 <= kept / sum(d.energy for d in differences.values()) < 0.6


def test_what_an_adapter_cannot_carry_is_counted():
    base = make_model("llama")

    difference = measure_difference(base, make_tuned(base, seed=1, norms=0.1), name="text", max_rank=4)

    norms = sum(0.01 * p.numel() for name, p in base.named_parameters() if "norm" in name)
    assert difference.other_energy == pytest.approx(norms, rel=1e-3)


def test_strangers_are_refused_with_their_distance():
    with pytest.raises(ModelError, match=r"'text' shares no base .* differs by 1\.\d\d times"):
        measure_difference(make_model("llama", seed=0), make_model("llama", seed=1), name="text", max_rank=4)
    with pytest.raises(ModelError, match=r"'text' is no fine-tune of the base: model\.embed_tokens\.weight is"):
        check_family(make_model("llama"), {"text": make_model("llama", hidden_size=32)})
    with pytest.raises(ModelError, match="nothing to extract"):
        measure_difference(make_model("llama"), make_model("llama"), name="text", max_rank=4)


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Any]:
    base = make_model("llama", tied=True)
    tuned = {name: make_tuned(base, seed=j) for j, name in enumerate(("text", "code"))}
    model = make_fused(tuned)
    save_fused(model, tmp_path / "model", tokenizer=make_tokenizer())
    save_specialist(base, tmp_path / "base")
    for name, one in tuned.items():
        save_specialist(one, tmp_path / name)
    return {"folder": tmp_path, "model": model}


def test_a_fused_model_becomes_one_of_a_shared_base_and_back(family: dict[str, Any]):
    folder, model = family["folder"], family["model"]

    shared, extracts = extract_fused(model, str(folder / "base"), energy=0.99999, share=1.0)
    save_fused(shared, folder / "shared", gate_only=True, tokenizer=make_tokenizer())
    loaded = FusedForCausalLM.from_pretrained(folder / "shared")

    assert set(extracts) == set(model.names)
    assert loaded.runs_jointly
    same_answers(loaded, model, atol=5e-3, rtol=5e-3)
    same_answers(
        FusedForCausalLM.from_pretrained(save_merged(str(folder / "shared"), folder / "m")),
        loaded,
        atol=1e-4,
        rtol=1e-4,
    )
    assert merge_adapters(loaded).config.shared_base is False


def test_the_commands(family: dict[str, Any], tmp_path: Path):
    folder = family["folder"]
    data = folder / "held.jsonl"
    turn = '{"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b!"}], "domain": "text"}'
    data.write_text(turn + "\n")
    runner = CliRunner()
    extract = ["extract-adapters", str(folder / "base")]

    fused = runner.invoke(
        app, [*extract, str(folder / "model"), "--out", str(tmp_path / "s"), "--share", "1", "--data", str(data)]
    )
    assert fused.exit_code == 0, fused.output
    assert "left out" in fused.output
    assert "before" in fused.output
    merged = runner.invoke(app, ["merge-adapters", str(tmp_path / "s"), "--out", str(tmp_path / "m")])
    assert merged.exit_code == 0, merged.output
    assert not FusedForCausalLM.from_pretrained(tmp_path / "m").config.shared_base
    pair = [f"{name}={folder / name}" for name in ("text", "code")]
    several = runner.invoke(app, [*extract, *pair, "--out", str(tmp_path / "a"), "--share", "1"])
    assert several.exit_code == 0, several.output
    built = FusedForCausalLM.from_specialists(
        {name: tmp_path / "a" / name for name in ("text", "code")}, shared_base=True
    )
    assert built.runs_jointly


def test_bad_input_is_refused_before_any_weight_loads(
    family: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    folder = family["folder"]
    save_specialist(make_model("llama", hidden_size=32), folder / "wide")
    monkeypatch.setattr(exporting, "load_specialist", lambda *_, **__: pytest.fail("weights were read"))

    with pytest.raises(ModelError, match="'wide' is no fine-tune of the base"):
        extract_specialists(str(folder / "base"), {"wide": str(folder / "wide")}, tmp_path / "out")
    with pytest.raises(ModelError, match="'text' is no fine-tune of the base"):
        exporting.check_fused_family(str(folder / "model"), str(folder / "wide"))
    with pytest.raises(ModelError, match="is no fused model"):
        exporting.check_fused_family(str(folder / "text"), str(folder / "base"))
    assert not (tmp_path / "out").exists()


def test_adapters_never_replace_the_models_they_were_taken_from(tmp_path: Path):
    (tmp_path / "tuned").mkdir()
    named = {
        name: str(save_specialist(make_model(seed=seed), tmp_path / "tuned" / name)) for seed, name in enumerate("ab")
    }

    with pytest.raises(ModelError, match="a is no part of a set of adapters: choose another folder"):
        extract_specialists(named["a"], named, tmp_path / "tuned")

    assert sorted(path.name for path in (tmp_path / "tuned").iterdir()) == ["a", "b"]


@pytest.mark.parametrize("command", ["extract-adapters", "merge-adapters"])
def test_what_is_made_of_a_model_does_not_replace_it(command: str, tmp_path: Path):
    folder = save_fused(make_fused(), tmp_path / "fused", tokenizer=make_tokenizer())
    before = sorted(path.name for path in folder.iterdir())
    base = [str(tmp_path)] if command == "extract-adapters" else []

    ended = CliRunner().invoke(app, [command, *base, str(folder), "--out", str(folder)])

    assert isinstance(ended.exception, ConfigError)
    assert "is the model itself, which would be lost" in str(ended.exception)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_an_energy_that_is_none_is_refused(family: dict[str, Any]):
    with pytest.raises(ConfigError, match="energy 1"):
        extract_fused(family["model"], str(family["folder"] / "base"), energy=1.5)
