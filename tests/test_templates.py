"""Templates: golden texts of each, where templates are found, and what is said when one fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ultrafuser.chat import TEMPLATE_NAMES, Conversation, Message, Template, find_end_of_turn, load_template
from ultrafuser.errors import TemplateError

SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

QUESTION: Conversation = (Message("user", "What is 2 + 2?"),)
WITH_SYSTEM: Conversation = (Message("system", "Be brief."), *QUESTION)
TWO_TURNS: Conversation = (*WITH_SYSTEM, Message("assistant", "4."), Message("user", "And 3 + 3?"))

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)
CHATML_TWO_TURNS = (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n"
    "<|im_start|>assistant\n4.<|im_end|>\n"
    "<|im_start|>user\nAnd 3 + 3?<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def render(name: str, conversation: Conversation, *, add_generation_prompt: bool = True) -> str:
    return load_template(name).render(
        conversation, bos_token="<s>", eos_token="</s>", add_generation_prompt=add_generation_prompt
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ultralm", "User: What is 2 + 2?\nAssistant:"),
        ("codellama", "<s>[INST] What is 2 + 2? [/INST]"),
        ("wizardmath", ALPACA.format("What is 2 + 2?")),
    ],
)
def test_the_papers_prompts_are_verbatim(name: str, expected: str) -> None:
    """The texts of the paper's table; BOS, which the paper writes for CodeLlama alone, opens all three."""
    assert render(name, QUESTION) == "<s>" + expected.removeprefix("<s>")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"),
        (
            "qwen",
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama-3",
            "<s><|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 2?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("plain", "<s>What is 2 + 2?"),
    ],
)
def test_a_question_is_written_as_the_model_was_trained(name: str, expected: str) -> None:
    assert render(name, QUESTION) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ultralm", "<s>User: Be brief.\nUser: What is 2 + 2?\nAssistant:4.</s>\nUser: And 3 + 3?\nAssistant:"),
        (
            "codellama",
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is 2 + 2? [/INST]4.</s><s>[INST] And 3 + 3? [/INST]",
        ),
        (
            "wizardmath",
            "<s>Be brief.\n\n" + ALPACA.format("What is 2 + 2?") + "4.</s>\n\n"
            "### Instruction:\nAnd 3 + 3?\n\n### Response:",
        ),
        ("chatml", CHATML_TWO_TURNS),
        ("qwen", CHATML_TWO_TURNS),
        (
            "llama-3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 2?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n4.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nAnd 3 + 3?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("plain", "<s>Be brief.What is 2 + 2?4.</s>And 3 + 3?"),
    ],
)
def test_a_system_message_and_a_second_turn_are_written(name: str, expected: str) -> None:
    assert render(name, TWO_TURNS) == expected


def test_codellama_differs_from_llama_2_only_in_the_spaces_around_responses() -> None:
    """Llama-2's chat format as Meta's reference code and its tokenizer write it."""
    reference = "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is 2 + 2? [/INST] 4. </s><s>[INST] And 3 + 3? [/INST]"

    assert render("codellama", TWO_TURNS) == reference.replace(" 4. ", "4.")


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_without_generation_prompt_the_text_ends_with_the_turn(name: str) -> None:
    text = render(name, (*QUESTION, Message("assistant", "4.")), add_generation_prompt=False)

    ending = "".join(load_template(name).end_of_turn) or "</s>"
    assert text.rstrip().endswith("4." + ending)


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_a_tokenizer_without_special_tokens_gets_none(name: str) -> None:
    text = load_template(name).render(TWO_TURNS)

    assert "<s>" not in text
    assert "</s>" not in text


@pytest.mark.parametrize(
    ("name", "end_of_turn"),
    [
        ("ultralm", ()),
        ("codellama", ()),
        ("wizardmath", ()),
        ("plain", ()),
        ("chatml", ("<|im_end|>",)),
        ("qwen", ("<|im_end|>",)),
        ("llama-3", ("<|eot_id|>",)),
    ],
)
def test_a_template_knows_how_its_models_end_a_turn(name: str, end_of_turn: tuple[str, ...]) -> None:
    assert load_template(name).end_of_turn == end_of_turn


def test_a_tokenizers_own_template_is_used() -> None:
    template = load_template("tokenizer", tokenizer_template=SMOLLM2_TEMPLATE)

    assert template.end_of_turn == ("<|im_end|>",)
    assert template.render(QUESTION) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_jinja_file_is_a_template(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}\n")

    template = load_template(str(file))

    assert template.render(QUESTION) == "What is 2 + 2?|"
    assert template.end_of_turn == ("|",)


def test_a_template_sees_what_transformers_offers() -> None:
    source = (
        "{%- for m in messages %}{{ m | tojson }}{% if tools %}no{% endif %}{{ strftime_now('%Y') | length }}"
        "{% break %}{% endfor %}"
    )

    assert Template("mine", source).render((Message("user", "<é>"),)) == '{"role": "user", "content": "<é>"}4'


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(TemplateError, match=r"unknown template 'alpaca'; known: ultralm, .*, tokenizer, or the path"):
        load_template("alpaca")


def test_a_tokenizer_without_a_template_is_an_error() -> None:
    with pytest.raises(TemplateError, match="the tokenizer has no chat template of its own; choose one of ultralm"):
        load_template("tokenizer")


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match=r"template file '.*none\.jinja' cannot be read: No such file"):
        load_template(str(tmp_path / "none.jinja"))


def test_a_file_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "binary.jinja"
    file.write_bytes(b"\xff\xfe\xff")

    with pytest.raises(TemplateError, match="it is not UTF-8 text"):
        load_template(str(file))


def test_broken_jinja_is_an_error_at_load_and_names_the_line() -> None:
    with pytest.raises(TemplateError, match="template 'tokenizer' is not valid Jinja: line 2: "):
        load_template("tokenizer", tokenizer_template="fine\n{% for %}")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('no\nsystem') }}", "no system"),
        ("{{ messages[7]['role'] }}", "has no element 7"),
        ("{{ 'a' + 1 }}", "can only concatenate"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_failing_template_says_which_and_why_in_one_line(source: str, reason: str) -> None:
    with pytest.raises(TemplateError, match="template 'mine' cannot write this conversation: ") as caught:
        Template("mine", source).render(QUESTION)

    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["codellama", "wizardmath"])
def test_a_late_system_message_is_refused_where_it_has_no_place(name: str) -> None:
    with pytest.raises(TemplateError, match="the system message must come first"):
        render(name, (*QUESTION, Message("system", "Be brief.")))


def test_codellama_refuses_two_questions_in_a_row() -> None:
    with pytest.raises(TemplateError, match="user and assistant must alternate"):
        render("codellama", (*QUESTION, *QUESTION))


def test_an_ending_that_cannot_be_guessed_is_none() -> None:
    assert find_end_of_turn(Template("mine", "{{ raise_exception('tools only') }}")) == ()


def test_importing_chat_is_light() -> None:
    """Neither torch nor transformers is loaded before something is rendered."""
    code = "import sys, ultrafuser.chat; print([m for m in ('torch', 'transformers') if m in sys.modules])"

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "[]"
