"""What vLLM cannot serve is told in one line before anything is loaded: from configuration and file headers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import make_fused, make_mixed, make_model, make_tokenizer, make_trio, save_specialist
from ultrafuser.errors import ConfigError, ModelError, UltrafuserError, VocabularyError
from ultrafuser.model.checkpoint import save_fused
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.specialist import state_digest
from ultrafuser.vllm_plugin.checks import (
    check_folder,
    check_options,
    check_vocabulary,
    files_digest,
    longest_context,
    template_names,
)
from ultrafuser.vllm_plugin.weights import deal


def config_of(**options: Any) -> Any:
    return make_fused(**options).config


def message(error: pytest.ExceptionInfo[UltrafuserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return save_fused(make_fused(), tmp_path / "whole", tokenizer=make_tokenizer())


@pytest.fixture
def gate_only(tmp_path: Path) -> Path:
    """A gate and three folders; one specialist's head is tied to its embeddings."""
    trio = make_trio() | {"code": make_model(seed=1, tied=True)}
    folders = {name: save_specialist(model, tmp_path / name) for name, model in trio.items()}
    fused = FusedForCausalLM.from_specialists(folders, templates="chatml", gate_hidden_size=8)
    return save_fused(fused, tmp_path / "gate", tokenizer=make_tokenizer(), gate_only=True)


def read_config(folder: Path) -> Any:
    from ultrafuser.model.configuration import FusedConfig

    return FusedConfig.from_pretrained(folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weighting": "perplexity"}, "weighting: perplexity"),
        ({"granularity": "prompt"}, "granularity: prompt"),
        ({"fusion_space": "probs"}, "probs"),
    ],
)
def test_options_that_vllm_cannot_follow_are_refused(options: dict[str, str], words: str):
    with pytest.raises(ConfigError) as error:
        check_options(config_of(**options))

    assert words in message(error)
    assert "ultrafuser serve" in message(error)


@pytest.mark.parametrize("options", [{}, {"weighting": "uniform"}, {"fusion_space": "logprobs"}, {"solo": "code"}])
def test_options_that_change_nothing_for_vllm_pass(options: dict[str, str]):
    check_options(config_of(**options))


def test_capped_logits_are_refused():
    with pytest.raises(ConfigError) as error:
        check_options(config_of(specialists={"text": make_model("gemma2"), "code": make_model("gemma2", seed=1)}))

    assert "'text' caps its logits" in message(error)


@pytest.mark.parametrize(("key", "kind"), [("adapter", "an adapter"), ("gguf_file", "a GGUF file")])
def test_a_gate_over_what_vllm_cannot_load_is_refused(key: str, kind: str):
    config = config_of()
    config.sources[1][key] = "somewhere"
    check_options(config)
    config.gate_only = True

    with pytest.raises(ConfigError) as error:
        check_options(config)

    assert f"'code' comes from {kind}" in message(error)
    assert "ultrafuser export" in message(error)


def test_a_whole_folder_and_a_gate_with_its_specialists_pass(whole: Path, gate_only: Path):
    for folder in (whole, gate_only):
        check_folder(folder, read_config(folder))
        check_vocabulary(str(folder), read_config(folder))


def test_a_missing_shard_is_named(tmp_path: Path):
    folder = save_fused(make_fused(), tmp_path / "model", max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[1].unlink()

    with pytest.raises(ModelError) as error:
        check_folder(folder, read_config(folder))

    assert f"lacks {shards[1].name}, one of the {len(shards)} files" in message(error)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not json", "no index of weights"),
        (b'{"weight_map": 3}', "no index of weights"),
        (b"{}", "no index of weights"),
    ],
)
def test_a_damaged_index_is_named(whole: Path, content: bytes, words: str):
    (whole / "model.safetensors.index.json").write_bytes(content)

    with pytest.raises(ModelError) as error:
        check_folder(whole, read_config(whole))

    assert words in message(error)


def test_a_damaged_file_is_named(whole: Path):
    (whole / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")

    with pytest.raises(ModelError) as error:
        check_folder(whole, read_config(whole))

    assert "model.safetensors cannot be read" in message(error)


def test_no_weights_at_all_are_an_error(whole: Path):
    (whole / "model.safetensors").unlink()

    with pytest.raises(ModelError) as error:
        check_folder(whole, read_config(whole))

    assert "holds no model.safetensors" in message(error)


def test_a_specialist_that_is_not_in_the_files_is_named(whole: Path):
    values = json.loads((whole / "config.json").read_text())
    for key in ("specialists", "sources", "templates"):
        values[key].append(dict(values[key][0], name="poetry"))
    (whole / "config.json").write_text(json.dumps(values))

    with pytest.raises(ModelError) as error:
        check_folder(whole, read_config(whole))

    assert "no weights of specialists.poetry" in message(error)


@pytest.mark.parametrize("lost", ["specialists.code.model.layers.1.mlp.up_proj.weight", "fusion_gate.layers.0.bias"])
def test_a_weight_that_is_in_no_file_is_named(whole: Path, lost: str):
    state = load_file(whole / "model.safetensors")
    save_file({name: tensor for name, tensor in state.items() if name != lost}, whole / "model.safetensors")

    with pytest.raises(ModelError) as error:
        check_folder(whole, read_config(whole))

    assert f"lacks the weight '{lost}': it is incomplete" in message(error)


def test_a_tied_head_may_be_missing_and_so_may_what_does_not_run(tmp_path: Path):
    tied = {name: make_model(seed=seed, tied=True) for seed, name in enumerate(("text", "code", "math"))}
    folder = save_fused(make_fused(tied), tmp_path / "tied")
    check_folder(folder, read_config(folder))
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if ".code." in k}, folder / "model.safetensors")

    config = read_config(folder)
    config.solo = "code"
    check_folder(folder, config)


def test_weights_of_another_vocabulary_are_refused(whole: Path):
    config = read_config(whole)
    config.vocab_size -= 1

    with pytest.raises(VocabularyError) as error:
        check_folder(whole, config)

    assert "has 262 rows, but the specialists share 261 tokens" in message(error)


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(whole: Path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(whole)

    with pytest.raises(VocabularyError) as error:
        check_vocabulary(str(whole), read_config(whole))

    assert "has the token '<new>' at 262, but the model has 262 rows" in message(error)


def test_a_specialist_of_another_vocabulary_is_named(gate_only: Path):
    make_tokenizer(swap=("a", "b")).save_pretrained(gate_only.parent / "math")

    with pytest.raises(VocabularyError) as error:
        check_vocabulary(str(gate_only), read_config(gate_only))

    assert "'math'" in message(error)


def test_a_specialist_trained_since_is_refused(gate_only: Path):
    save_specialist(make_model(seed=7), gate_only.parent / "text")

    with pytest.raises(ModelError) as error:
        check_folder(gate_only, read_config(gate_only))

    assert "'text'" in message(error)
    assert "not the one this gate was trained with" in message(error)


def test_a_gate_only_folder_without_its_gate_is_refused(gate_only: Path):
    (gate_only / "gate.safetensors").unlink()

    with pytest.raises(ModelError) as error:
        check_folder(gate_only, read_config(gate_only))

    assert "gate.safetensors is missing" in message(error)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_digest_of_files_is_that_of_the_loaded_model(tmp_path: Path, tied: bool, dtype: torch.dtype):
    model = make_model(tied=tied).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="20KB")

    found = files_digest(tmp_path, dtype=torch.float32, vocab_size=model.config.vocab_size, tied=tied)

    assert found == state_digest(model.float())


def test_the_shortest_context_counts_and_solo_counts_alone():
    trio = make_trio() | {"code": make_model(seed=1, max_position_embeddings=96)}

    assert longest_context(config_of(specialists=trio)) == 96
    assert longest_context(config_of(specialists=trio, solo="math")) > 96


def test_templates_that_differ_are_told_apart_by_what_they_write():
    assert template_names(config_of()) == ["ultralm", "codellama", "wizardmath"]
    assert template_names(config_of(templates="chatml")) == ["chatml"]
    assert template_names(config_of(solo="code")) == ["codellama"]


def test_weights_are_dealt_to_their_owners_under_their_own_names():
    fused = make_fused(make_mixed(), templates=None)
    state = list(fused.state_dict().items())

    dealt = [(owner, {name: tensor.shape for name, tensor in part}) for owner, part in deal(state, fused.config)]

    assert [owner for owner, _ in dealt] == ["text", "code", "math", "fusion_gate"]
    for owner, part in dealt:
        module = fused.fusion_gate if owner == "fusion_gate" else fused.specialists[owner]
        assert part == {name: tensor.shape for name, tensor in module.state_dict().items()}


def test_a_gate_only_stream_has_no_prefix_for_the_gate_and_surplus_rows_are_cut():
    fused = make_fused()
    wide = torch.zeros(fused.config.vocab_size + 3, 16)
    stream = [("layers.0.weight", torch.zeros(1)), ("specialists.code.model.embed_tokens.weight", wide)]

    dealt = {owner: list(part) for owner, part in deal(stream, fused.config)}

    assert [name for name, _ in dealt["fusion_gate"]] == ["layers.0.weight"]
    assert dealt["code"][0][1].shape[0] == fused.config.vocab_size


def test_specialists_that_do_not_run_get_nothing():
    fused = make_fused(solo="math")

    owners = [owner for owner, part in deal(fused.state_dict().items(), fused.config) if list(part)]

    assert owners == ["math", "fusion_gate"]
