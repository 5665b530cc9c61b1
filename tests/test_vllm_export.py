"""`ultrafuser export`: one template for all specialists, whole or not at all, and its cost measured."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, pipeline

from helpers import PAPER_TEMPLATES, make_fused, make_tokenizer, make_trio, save_specialist
from ultrafuser.chat.messages import Conversation, Message
from ultrafuser.cli.export import export
from ultrafuser.config.load import parse_recipe
from ultrafuser.errors import ConfigError, DataError, ModelError, TemplateError, UltrafuserError
from ultrafuser.evaluation.losses import score_losses
from ultrafuser.export.records import held_out_conversations
from ultrafuser.export.shared import measure_cost, save_shared, shared_template
from ultrafuser.generation import SamplingParams
from ultrafuser.model.build import read_templates
from ultrafuser.model.checkpoint import save_fused
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.generator import FusedGenerator
from ultrafuser.vllm_plugin.checks import template_names

QUESTIONS = ("hi", "What is two and two?", "Write a loop.", "Who was Ada?")


def answered(text: str) -> Conversation:
    return (Message("user", text), Message("assistant", f"{text} indeed"))


def write_records(path: Path) -> Path:
    domains = ("text", "math", "code", "text")
    lines = [
        {"messages": [message.to_dict() for message in answered(text)], "domain": domain}
        for text, domain in zip(QUESTIONS, domains, strict=True)
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return save_fused(make_fused(), tmp_path / "model", tokenizer=make_tokenizer())


def test_all_specialists_of_the_export_read_one_prompt(model_folder: Path, tmp_path: Path):
    export(str(model_folder), tmp_path / "out", "vllm", "chatml", None, 64, False, "")

    exported = FusedGenerator.from_pretrained(str(tmp_path / "out"))
    prompts = exported.encoder.encode_prompt((Message("user", "hi"),))
    assert len(set(prompts)) == 1
    assert {template.name for template in read_templates(exported.model.config)} == {"chatml"}


def test_the_tokenizer_of_the_export_writes_what_the_specialists_read(model_folder: Path, tmp_path: Path):
    """vLLM, transformers and lm-eval take the prompt from the tokenizer."""
    for template in ("chatml", "codellama", "math"):
        export(str(model_folder), tmp_path / "out", "vllm", template, None, 64, False, "")

        exported = FusedGenerator.from_pretrained(str(tmp_path / "out"))
        messages = [{"role": "user", "content": "What is it?"}]
        written = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        ids = exported.tokenizer(written, add_special_tokens=False)["input_ids"]
        assert tuple(ids) == exported.encoder.encode_prompt((Message("user", "What is it?"),))[0]


def test_the_export_stops_where_its_template_ends_a_turn(model_folder: Path, tmp_path: Path):
    export(str(model_folder), tmp_path / "out", "vllm", "chatml", None, 64, False, "")

    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert make_tokenizer().convert_tokens_to_ids("<|im_end|>") in ends
    assert make_tokenizer().eos_token_id in ends


def test_the_cost_is_the_difference_of_the_losses():
    model, tokenizer = make_fused(), make_tokenizer()
    held_out = {"text": [answered(text) for text in QUESTIONS]}

    (cost,) = measure_cost(model, tokenizer, shared_template(model, tokenizer, "chatml"), held_out)

    shared = make_fused(templates="chatml")
    own = score_losses(FusedGenerator(model, tokenizer), held_out["text"]).loss.value
    other = score_losses(FusedGenerator(shared, tokenizer), held_out["text"]).loss.value
    assert (cost.own, cost.shared) == pytest.approx((own, other))
    assert cost.change.value == pytest.approx(other - own)
    assert cost.change.low <= cost.change.value <= cost.change.high
    assert [template.name for template in read_templates(model.config)] == list(PAPER_TEMPLATES)


def test_the_cost_is_printed_for_every_domain_of_a_file(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    records = write_records(tmp_path / "records.jsonl")

    export(str(model_folder), tmp_path / "out", "vllm", "chatml", records, 64, False, "")

    printed = capsys.readouterr().out
    assert all(domain in printed for domain in ("text", "math", "code"))
    assert "shared template" in (tmp_path / "out" / "README.md").read_text()


def test_a_recipes_validation_records_are_taken(tmp_path: Path):
    lines = [{"messages": [m.to_dict() for m in answered(f"question {n}")]} for n in range(60)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "recipe.yaml").write_text(
        "name: x\nspecialists: {text: {model: m}}\n"
        "data: {domains: {text: {sources: [{path: text.jsonl}]}}, validation_fraction: 0.5}\n"
    )

    found = held_out_conversations(tmp_path / "recipe.yaml", per_domain=5)

    assert list(found) == ["text"]
    assert len(found["text"]) == 5


def test_records_without_a_domain_take_the_name_of_their_file(tmp_path: Path):
    path = tmp_path / "letters.jsonl"
    path.write_text(json.dumps({"messages": [message.to_dict() for message in answered("hi")]}))

    assert list(held_out_conversations(path, per_domain=3)) == ["letters"]


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("none.jsonl", None, DataError),
        ("none.yaml", None, ConfigError),
        ("bare.yaml", "name: x\nspecialists: {text: {model: m}}\n", ConfigError),
        ("empty.jsonl", "", DataError),
    ],
)
def test_data_that_cannot_be_used_is_one_line(
    tmp_path: Path, name: str, content: str | None, error: type[UltrafuserError]
):
    if content is not None:
        (tmp_path / name).write_text(content)

    with pytest.raises(error) as raised:
        held_out_conversations(tmp_path / name, per_domain=3)

    assert "\n" not in str(raised.value)


def test_an_unknown_template_writes_nothing(model_folder: Path, tmp_path: Path):
    with pytest.raises(TemplateError, match="unknown template 'nothing'"):
        export(str(model_folder), tmp_path / "out", "vllm", "nothing", None, 64, False, "")

    assert not (tmp_path / "out").exists()


def test_a_model_that_vllm_cannot_serve_writes_nothing(tmp_path: Path):
    folder = save_fused(make_fused(granularity="prompt"), tmp_path / "model", tokenizer=make_tokenizer())

    with pytest.raises(ConfigError, match="granularity: prompt"):
        export(str(folder), tmp_path / "out", "vllm", "chatml", None, 64, False, "")

    assert not (tmp_path / "out").exists()


def test_an_interrupted_export_leaves_the_old_one(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    export(str(model_folder), out, "vllm", "chatml", None, 64, False, "")
    before = (out / "config.json").read_text()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ultrafuser.model.checkpoint.write_model_card", full_disk)
    with pytest.raises(ModelError, match="nothing was replaced"):
        export(str(model_folder), out, "vllm", "ultralm", None, 64, False, "")

    assert (out / "config.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_a_model_is_not_exported_onto_itself(model_folder: Path):
    before = (model_folder / "config.json").read_bytes()

    with pytest.raises(ConfigError, match="is the model itself, which would be lost: choose another folder"):
        export(str(model_folder), model_folder, "vllm", "chatml", None, 64, False, "")

    assert (model_folder / "config.json").read_bytes() == before


def test_a_folder_of_something_else_is_refused_before_any_weight_loads(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")

    with pytest.raises(ModelError, match=r"thesis\.txt is no part of a fused model"):
        export(str(tmp_path / "no model"), tmp_path, "vllm", "chatml", None, 64, False, "")


def test_a_model_without_templates_needs_no_export():
    model = make_fused(templates=None)

    with pytest.raises(ModelError, match="serve it as it is"):
        shared_template(model, make_tokenizer(), "chatml")


def test_a_recipe_with_one_template_needs_no_export(tmp_path: Path):
    places = {name: str(save_specialist(model, tmp_path / name)) for name, model in make_trio().items()}
    tree = {"name": "x", "specialists": {n: {"model": place, "template": "chatml"} for n, place in places.items()}}

    model = FusedForCausalLM.from_recipe(parse_recipe(tree))

    assert template_names(model.config) == ["chatml"]


def test_transformers_pipeline_answers_as_the_export_does(model_folder: Path, tmp_path: Path):
    """The same folder through another door: messages in, the tokenizer's template, `generate()`."""
    model, tokenizer = FusedForCausalLM.from_pretrained(model_folder), make_tokenizer()
    save_shared(model, tokenizer, shared_template(model, tokenizer, "chatml"), tmp_path / "out")

    talk = pipeline("text-generation", model=str(tmp_path / "out"), device="cpu")
    answers = talk([{"role": "user", "content": "hi"}], max_new_tokens=8, do_sample=False)

    exported = FusedGenerator.from_pretrained(str(tmp_path / "out"))
    (expected,) = exported.generate([(Message("user", "hi"),)], SamplingParams(max_tokens=8))
    assert answers[0]["generated_text"][-1]["content"] == expected.text
