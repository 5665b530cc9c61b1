"""Saving and loading: whole or the gate alone, and nothing half-written or silently changed."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import ultrafuser.model.fused  # noqa: F401  registers the architecture
from helpers import (
    VOCAB_SIZE,
    make_fused,
    make_mixed,
    make_model,
    make_tokenizer,
    make_trio,
    reference_greedy,
    save_specialist,
)
from ultrafuser.errors import ModelError
from ultrafuser.model import checkpoint
from ultrafuser.model.checkpoint import save_fused
from ultrafuser.model.configuration import FusedConfig
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.generator import FusedGenerator
from ultrafuser.model.specialist import state_digest

IDS = torch.tensor([list(range(10, 20))])


def assert_same_model(a: FusedForCausalLM, b: FusedForCausalLM) -> None:
    assert a.names == b.names
    assert state_digest(a) == state_digest(b)
    one, two = a(input_ids=IDS), b(input_ids=IDS)
    torch.testing.assert_close(one.logits, two.logits)
    torch.testing.assert_close(one.gate_weights, two.gate_weights)


def from_folders(folder: Path, specialists: dict[str, Any] | None = None, **options: Any) -> FusedForCausalLM:
    """A fused model whose specialists lie in folders, as a gate-only file needs."""
    for name, model in (make_mixed() if specialists is None else specialists).items():
        save_specialist(model, folder / name)
    names = list(specialists or make_mixed())
    return make_fused({name: str(folder / name) for name in names}, **options)


# Full


@pytest.mark.parametrize("load", [FusedForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_a_full_model_in_shards_comes_back_the_same(tmp_path, load):
    specialists = {"text": make_model(tied=True), "gemma": make_model("gemma2", tied=True), **make_mixed()}
    fused = make_fused({**specialists, "a_last": make_model(seed=9)}, templates="plain", fusion_space="probs")
    fused.generation_config.max_new_tokens = 7

    save_fused(fused, tmp_path / "fused", tokenizer=make_tokenizer(), max_shard_size="20KB")
    again = load(tmp_path / "fused")

    assert len(list((tmp_path / "fused").glob("model-*.safetensors"))) > 3
    assert again.names == ["text", "gemma", "code", "math", "a_last"]
    assert_same_model(again, fused)
    assert again.config.templates == fused.config.templates
    assert again.config.fusion_space == "probs"
    assert again.generation_config.eos_token_id == fused.generation_config.eos_token_id
    assert again.generation_config.max_new_tokens == 7
    tied = again.specialists["gemma"]
    assert tied.get_input_embeddings().weight is tied.get_output_embeddings().weight
    free = again.specialists["a_last"]
    assert free.get_input_embeddings().weight is not free.get_output_embeddings().weight


def test_a_tied_head_is_stored_once(tmp_path):
    save_fused(make_fused(make_trio(tied=True)), tmp_path / "fused")

    (file,) = (tmp_path / "fused").glob("*.safetensors")
    assert not [key for key in load_file(file) if "lm_head" in key]


def test_loading_says_nothing_about_missing_or_unexpected_weights(tmp_path, caplog):
    save_fused(make_fused(make_mixed()), tmp_path / "fused")

    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        FusedForCausalLM.from_pretrained(tmp_path / "fused")
        FusedForCausalLM.from_pretrained(tmp_path / "fused", without=["math"])

    assert caplog.text == ""


@pytest.mark.parametrize("gate_only", [False, True])
def test_loading_in_bf16_keeps_the_gate_in_fp32(tmp_path, gate_only: bool):
    fused = from_folders(tmp_path)
    save_fused(fused, tmp_path / "fused", gate_only=gate_only)

    again = FusedForCausalLM.from_pretrained(tmp_path / "fused", dtype=torch.bfloat16)

    assert {p.dtype for p in again.specialists.parameters()} == {torch.bfloat16}
    assert state_digest(again.fusion_gate) == state_digest(fused.fusion_gate)
    assert {buffer.dtype for buffer in again.buffers()} == {torch.float32}  # RoPE's frequencies
    again(input_ids=IDS)


def test_a_bf16_model_comes_back_in_bf16_with_its_gate_in_fp32(tmp_path):
    fused = make_fused(make_mixed()).to(torch.bfloat16)
    save_fused(fused, tmp_path / "fused")

    again = FusedForCausalLM.from_pretrained(tmp_path / "fused")

    assert again.dtype == torch.bfloat16
    assert state_digest(again) == state_digest(fused)
    assert {p.dtype for p in again.fusion_gate.parameters()} == {torch.float32}


def test_a_saved_model_answers_conversations(tmp_path):
    fused = make_fused(make_mixed())
    save_fused(fused, tmp_path / "fused", tokenizer=make_tokenizer())

    generator = FusedGenerator.from_pretrained(str(tmp_path / "fused"))

    assert generator.names == fused.names
    assert AutoTokenizer.from_pretrained(tmp_path / "fused").eos_token == "</s>"
    ids = generator.model.generate(IDS, max_new_tokens=3, eos_token_id=None)[0, IDS.shape[1] :]
    assert ids.tolist() == reference_greedy(fused, [IDS[0].tolist()] * 3, max_tokens=3)


def test_the_configuration_survives_json_with_the_specialists_in_order(tmp_path):
    fused = make_fused({"z": make_model(), "a": make_model("qwen2", seed=1)})
    fused.config.save_pretrained(tmp_path)

    config = AutoConfig.from_pretrained(tmp_path)

    assert isinstance(config, FusedConfig)
    assert config.names == ["z", "a"]
    assert [type(part).__name__ for part in config.specialist_configs.values()] == ["LlamaConfig", "Qwen2Config"]
    assert config.to_dict() == FusedConfig.from_dict(json.loads(json.dumps(config.to_dict()))).to_dict()


def test_the_attention_implementation_reaches_every_specialist(tmp_path):
    save_fused(make_fused(), tmp_path / "fused")

    again = FusedForCausalLM.from_pretrained(tmp_path / "fused", attn_implementation="eager")

    assert {s.config._attn_implementation for s in again.specialists.values()} == {"eager"}


# Leaving out and adding


@pytest.mark.parametrize("gate_only", [False, True])
@pytest.mark.parametrize("load", [FusedForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_a_specialist_can_be_left_out(tmp_path, load, gate_only: bool):
    fused = from_folders(tmp_path)
    save_fused(fused, tmp_path / "fused", gate_only=gate_only)

    again = load(tmp_path / "fused", without=["code"])

    assert again.names == ["text", "math"]
    assert [t["name"] for t in again.config.templates] == ["ultralm", "wizardmath"]
    whole, part = fused(input_ids=IDS).gate_weights, again(input_ids=IDS).gate_weights
    torch.testing.assert_close(part, whole[..., [0, 2]] / whole[..., [0, 2]].sum(dim=-1, keepdim=True))
    answer = again.generate(IDS, max_new_tokens=3, eos_token_id=None)[0, IDS.shape[1] :]
    assert answer.tolist() == reference_greedy(again, [IDS[0].tolist()] * 2, max_tokens=3)


def test_the_weights_of_a_specialist_that_is_left_out_are_not_read(tmp_path, monkeypatch):
    save_fused(make_fused(), tmp_path / "fused")
    read: list[str] = []

    class Watched:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = safe_open(*args, **kwargs)

        def __enter__(self) -> "Watched":
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_slice(self, key: str) -> Any:
            slice_, watched = self.file.get_slice(key), read

            class Slice:
                def __getitem__(self, index: Any) -> Any:
                    watched.append(key)
                    return slice_[index]

                def __getattr__(self, name: str) -> Any:
                    return getattr(slice_, name)

            return Slice()

        def get_tensor(self, key: str) -> Any:
            read.append(key)
            return self.file.get_tensor(key)

    monkeypatch.setattr("transformers.modeling_utils.safe_open", Watched)
    FusedForCausalLM.from_pretrained(tmp_path / "fused", without=["math"])

    assert {key.split(".")[1] for key in read if key.startswith("specialists.")} == {"text", "code"}


def test_leaving_out_what_is_not_there_or_everything_is_refused(tmp_path):
    fused = make_fused()
    save_fused(fused, tmp_path / "fused")

    with pytest.raises(ModelError, match="cannot leave out poetry: the model has text, code, math"):
        FusedForCausalLM.from_pretrained(tmp_path / "fused", without=["poetry"])
    with pytest.raises(ModelError, match="cannot leave out every specialist"):
        FusedForCausalLM.from_pretrained(tmp_path / "fused", without=fused.names)


@pytest.mark.parametrize("gate_only", [False, True])
def test_leaving_out_the_only_other_size_is_refused_since_the_gate_would_not_fit(tmp_path, gate_only: bool):
    specialists = {"text": make_model(), "code": make_model(seed=1), "math": make_model(seed=2, hidden_size=8)}
    save_fused(from_folders(tmp_path, specialists), tmp_path / "fused", gate_only=gate_only)

    with pytest.raises(ModelError, match="trained with a projection for each"):
        FusedForCausalLM.from_pretrained(tmp_path / "fused", without=["math"])


def test_the_one_that_answered_alone_may_be_left_out(tmp_path):
    save_fused(make_fused(solo="math"), tmp_path / "fused")

    assert FusedForCausalLM.from_pretrained(tmp_path / "fused", without=["math"]).config.solo is None


@pytest.mark.parametrize("gate_only", [False, True])
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_specialist_can_be_added(tmp_path, gate_only: bool, in_memory: bool):
    fused = from_folders(tmp_path, make_trio())
    save_fused(fused, tmp_path / "fused", gate_only=gate_only, tokenizer=make_tokenizer())
    poetry = make_model("gpt2", seed=7)
    given = poetry if in_memory else save_specialist(poetry, tmp_path / "poetry")

    again = FusedForCausalLM.from_pretrained(
        tmp_path / "fused", add={"poetry": given}, add_templates={"poetry": "chatml"}
    )

    assert again.names == ["text", "code", "math", "poetry"]
    assert [t["name"] for t in again.config.templates] == ["ultralm", "codellama", "wizardmath", "chatml"]
    assert state_digest(again.fusion_gate) == state_digest(fused.fusion_gate)
    assert state_digest(again.specialists["poetry"]) == state_digest(poetry)
    assert set(again.generation_config.eos_token_id) == {2, 4}
    assert again.config.end_token == "</s>"
    whole = again(input_ids=IDS).gate_weights[..., :3]
    torch.testing.assert_close(whole / whole.sum(dim=-1, keepdim=True), fused(input_ids=IDS).gate_weights)
    save_fused(again, tmp_path / "grown")
    assert_same_model(FusedForCausalLM.from_pretrained(tmp_path / "grown"), again)
    if not in_memory:
        save_fused(again, tmp_path / "grown-gate", gate_only=True)
        assert_same_model(FusedForCausalLM.from_pretrained(tmp_path / "grown-gate"), again)


def test_adding_another_size_or_a_name_twice_is_refused(tmp_path):
    save_fused(make_fused(templates=None), tmp_path / "fused")

    with pytest.raises(ModelError, match="another hidden size, which changes the shape of the gate"):
        FusedForCausalLM.from_pretrained(tmp_path / "fused", add={"poetry": make_model(hidden_size=8)})
    with pytest.raises(ModelError, match="cannot add text: the model has a specialist of that name"):
        FusedForCausalLM.from_pretrained(tmp_path / "fused", add={"text": make_model()})


# Gate only


@pytest.mark.parametrize("load", [FusedForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize("specialists", [make_trio, make_mixed])
def test_a_gate_alone_comes_back_with_its_specialists(tmp_path, load, specialists):
    fused = from_folders(tmp_path, specialists())
    fused.generation_config.max_new_tokens = 7

    save_fused(fused, tmp_path / "gate", gate_only=True)
    again = load(tmp_path / "gate")

    size = sum(file.stat().st_size for file in (tmp_path / "gate").rglob("*"))
    assert size < 30_000
    assert not list((tmp_path / "gate").glob("model*.safetensors"))
    assert_same_model(again, fused)
    assert again.config.templates == fused.config.templates
    assert again.config.end_token == "</s>"
    assert again.generation_config.eos_token_id == fused.generation_config.eos_token_id
    assert again.generation_config.max_new_tokens == 7


def test_a_model_from_a_gate_alone_can_be_saved_whole_and_as_a_gate_again(tmp_path):
    fused = from_folders(tmp_path)
    save_fused(fused, tmp_path / "gate", gate_only=True)
    again = FusedForCausalLM.from_pretrained(tmp_path / "gate")

    save_fused(again, tmp_path / "whole")
    save_fused(again, tmp_path / "gate2", gate_only=True)

    shutil.rmtree(tmp_path / "gate")
    assert_same_model(FusedForCausalLM.from_pretrained(tmp_path / "gate2"), fused)
    for name in fused.names:
        shutil.rmtree(tmp_path / name)
    assert_same_model(FusedForCausalLM.from_pretrained(tmp_path / "whole"), fused)


def test_a_specialist_that_changed_since_is_refused_in_one_line(tmp_path):
    save_fused(from_folders(tmp_path), tmp_path / "gate", gate_only=True)
    save_specialist(make_model("qwen2", seed=77, hidden_size=24, tied=True), tmp_path / "code")

    line = (
        r"^specialist 'code' from [^\n]+ is not the one this gate was trained with \(weights \w{12}, expected \w{12}\)"
    )
    with pytest.raises(ModelError, match=line):
        FusedForCausalLM.from_pretrained(tmp_path / "gate")
    assert FusedForCausalLM.from_pretrained(tmp_path / "gate", check_digests=False).names == ["text", "code", "math"]


def test_a_specialist_that_is_gone_is_named_in_one_line(tmp_path):
    save_fused(from_folders(tmp_path), tmp_path / "gate", gate_only=True)
    shutil.rmtree(tmp_path / "code")

    with pytest.raises(ModelError, match=r"^specialist 'code': no model could be loaded from [^\n]+$"):
        FusedForCausalLM.from_pretrained(tmp_path / "gate")
    assert FusedForCausalLM.from_pretrained(tmp_path / "gate", without=["code"]).names == ["text", "math"]


def test_a_gate_that_is_missing_is_named_in_one_line(tmp_path):
    save_fused(from_folders(tmp_path), tmp_path / "gate", gate_only=True)
    (tmp_path / "gate" / "gate.safetensors").unlink()

    with pytest.raises(ModelError, match=r"gate\.safetensors is missing: the folder is incomplete"):
        FusedForCausalLM.from_pretrained(tmp_path / "gate")


def test_a_gate_alone_needs_specialists_that_lie_somewhere():
    with pytest.raises(ModelError, match="'text' came from no folder or hub id"):
        save_fused(make_fused(), "never-written", gate_only=True)
    assert not Path("never-written").exists()


def test_a_gate_alone_needs_specialists_as_they_were(tmp_path):
    """After stage 2 the folder it came from no longer holds the specialist, so a reference to it would lie."""
    fused = from_folders(tmp_path)
    with torch.no_grad():
        next(fused.specialists["code"].parameters()).add_(0.1)

    with pytest.raises(ModelError, match=r"'code' is no longer what .* holds"):
        save_fused(fused, tmp_path / "gate", gate_only=True)
    assert not (tmp_path / "gate").exists()


def test_a_gate_alone_remembers_how_many_rows_all_shared(tmp_path):
    """Leaving out the smallest must not give the others back the rows that they lost."""
    specialists = {"text": make_model(), "code": make_model(seed=1, vocab_size=VOCAB_SIZE + 4)}
    fused = from_folders(tmp_path, specialists)
    save_fused(fused, tmp_path / "gate", gate_only=True)

    assert_same_model(FusedForCausalLM.from_pretrained(tmp_path / "gate"), fused)
    alone = FusedForCausalLM.from_pretrained(tmp_path / "gate", without=["text"])
    assert alone(input_ids=IDS).logits.shape[-1] == VOCAB_SIZE


def test_a_gate_alone_refers_to_adapters_and_relative_folders(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    base = save_specialist(make_model(), tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(make_model(), lora).save_pretrained("adapter")
    source = checkpoint.SpecialistConfig(model=base.name, adapter="adapter")
    fused = make_fused({"text": "base", "code": source})

    save_fused(fused, "gate", gate_only=True)
    monkeypatch.chdir("/")

    assert_same_model(FusedForCausalLM.from_pretrained(tmp_path / "gate"), fused)


# Whole or not at all


def fail_with(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")],
    ids=["OSError", "SafetensorError"],
)
@pytest.mark.parametrize("where", ["weights", "card"])
def test_a_save_that_fails_leaves_the_old_folder_whole(tmp_path, monkeypatch, error: Exception, where: str):
    old = make_fused()
    save_fused(old, tmp_path / "fused")
    if where == "weights":
        monkeypatch.setattr(FusedForCausalLM, "save_pretrained", fail_with(error))
    else:
        monkeypatch.setattr(checkpoint, "write_model_card", fail_with(error))

    with pytest.raises(
        ModelError, match=r"cannot write the model to .*: .*No space left on device.*; nothing was replaced"
    ):
        save_fused(make_fused(make_mixed()), tmp_path / "fused")

    assert [path.name for path in tmp_path.iterdir()] == ["fused"]
    assert_same_model(FusedForCausalLM.from_pretrained(tmp_path / "fused"), old)


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    old = make_fused()
    save_fused(old, tmp_path / "fused")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if "partial" in self.name:
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ModelError, match="Permission denied; nothing was replaced"):
        save_fused(make_fused(make_mixed()), tmp_path / "fused")

    assert [path.name for path in tmp_path.iterdir()] == ["fused"]
    assert_same_model(FusedForCausalLM.from_pretrained(tmp_path / "fused"), old)


def test_a_new_save_replaces_the_old_folder_wholly(tmp_path):
    save_fused(make_fused(make_mixed()), tmp_path / "fused", max_shard_size="10KB")
    (tmp_path / "fused" / "inspection").mkdir()  # of the old model, so it goes with it
    new = make_fused()

    save_fused(new, tmp_path / "fused")

    assert len(list((tmp_path / "fused").glob("*.safetensors"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["fused"]
    assert_same_model(FusedForCausalLM.from_pretrained(tmp_path / "fused"), new)


@pytest.mark.parametrize("lost", ["thesis.txt", "text/model.safetensors", "fused/.git/HEAD", "fused/text/config.json"])
def test_a_folder_that_holds_something_else_is_not_replaced(lost: str, tmp_path: Path):
    if lost.startswith("fused/"):
        save_fused(make_fused(), tmp_path / "fused")
    target = tmp_path / "fused" if lost.startswith("fused/") else tmp_path
    (tmp_path / lost).parent.mkdir(exist_ok=True)
    (tmp_path / lost).write_text("years of work")

    with pytest.raises(ModelError, match=r"would be replaced as a whole, but .* is no part of a fused model: choose"):
        save_fused(make_fused(), target)

    assert (tmp_path / lost).read_text() == "years of work"


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path):
    (tmp_path / "fused").write_text("years of work")

    with pytest.raises(ModelError, match="no part of a fused model"):
        save_fused(make_fused(), tmp_path / "fused")

    assert (tmp_path / "fused").read_text() == "years of work"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)

    with pytest.raises(ModelError, match="cannot write the model to"):
        save_fused(make_fused(), tmp_path / "fused")


# The model card


def test_the_model_card_says_what_was_fused_and_how_good_it_is(tmp_path):
    results = {"fused:stage1": {"text": {"loss": 1.25}, "math": {"loss": 0.5}}, "average": {"text": {"loss": 2.0}}}

    save_fused(from_folders(tmp_path), tmp_path / "fused", recipe="name: tiny\nseed: 3\n", results=results)

    card = (tmp_path / "fused" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"| code | qwen2 | 24 | {tmp_path / 'code'} | codellama |" in card
    assert "| model | text | math |" in card
    assert "| fused:stage1 | 1.250 | 0.500 |" in card
    assert "| average | 2.000 |  |" in card
    assert "```yaml\nname: tiny\nseed: 3\n```" in card
    assert (tmp_path / "fused" / "recipe.yaml").read_text() == "name: tiny\nseed: 3\n"


def test_a_folder_that_holds_no_fused_model_is_refused_in_one_line(tmp_path):
    save_specialist(make_model(), tmp_path / "llama")

    with pytest.raises(ModelError, match=r"holds a llama model and no fused one: make one with from_specialists$"):
        FusedForCausalLM.from_pretrained(tmp_path / "llama")
    with pytest.raises(ModelError, match=r"^no fused model could be loaded from [^\n]+$"):
        FusedForCausalLM.from_pretrained(tmp_path / "nowhere")


def test_a_folder_that_lacks_a_weight_is_refused_and_not_filled_with_random_numbers(tmp_path):
    folder = save_fused(make_fused(), tmp_path / "fused", tokenizer=make_tokenizer())
    weights = load_file(folder / "model.safetensors")
    weights.pop("specialists.code.model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ModelError, match=r"lacks the weight 'specialists.code.model.layers.1.mlp.up_proj.weight'"):
        FusedForCausalLM.from_pretrained(folder)
