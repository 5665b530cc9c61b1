"""Own prompts in a request: written by a client from its messages, read back by the server, or refused in one line."""

from pathlib import Path
from typing import Any

import pytest

from helpers import make_fused, make_tokenizer
from ultrafuser.chat.messages import Message
from ultrafuser.errors import DataError, ModelError, RequestError
from ultrafuser.model.checkpoint import save_fused
from ultrafuser.model.generator import FusedGenerator
from ultrafuser.vllm_plugin.requests import check_length, prompt_encoder, read_prompts, vllm_request, write_prompts

ROWS = ((1, 2, 3), (4,), (5, 6))
ASKED = (Message("user", "What is two and two?"),)


def read(arguments: Any, **changes: int) -> Any:
    return read_prompts(arguments, **{"num_specialists": 3, "vocab_size": 10, **changes})


def test_what_is_written_is_read_back():
    assert read(write_prompts(ROWS)) == ROWS


@pytest.mark.parametrize("arguments", [None, {}, {"session_id": "x"}])
def test_a_request_without_them_brings_none(arguments: Any):
    assert read(arguments) is None
    assert read(arguments, num_specialists=0) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt_lengths": None}, "prompt_lengths should be a list of whole numbers, but is None"),
        ({"prompt_ids": "123456"}, "prompt_ids should be a list of whole numbers, but is '123456'"),
        ({"prompt_ids": []}, "prompt_ids should be a list of whole numbers, but is []"),
        ({"prompt_ids": [1, 2, 3, 4, 5, 6.0]}, "should be a list of whole numbers"),
        ({"prompt_ids": [1, 2, 3, 4, 5, True]}, "should be a list of whole numbers"),
        ({"prompt_lengths": [3, 3]}, "has 2 prompts, but the model has 3 specialists"),
        ({"prompt_lengths": [3, 0, 3]}, "holds 0: a specialist's prompt has at least one token"),
        ({"prompt_lengths": [3, -1, 4]}, "holds -1"),
        ({"prompt_lengths": [3, 1, 1]}, "add up to 5, but prompt_ids holds 6 ids"),
        ({"prompt_ids": [1, 2, 3, 4, 5, 10]}, "holds 10, but the model's ids are 0 to 9"),
        ({"prompt_ids": [1, 2, 3, 4, 5, -1]}, "holds -1, but the model's ids are 0 to 9"),
    ],
)
def test_a_damaged_list_is_one_line(changes: dict[str, Any], words: str):
    with pytest.raises(RequestError) as error:
        read({**write_prompts(ROWS), **changes})

    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("missing", ["prompt_lengths", "prompt_ids"])
def test_one_list_without_the_other_is_refused(missing: str):
    arguments = {key: value for key, value in write_prompts(ROWS).items() if key != missing}

    with pytest.raises(RequestError, match=f"{missing} should be a list of whole numbers, but is missing"):
        read(arguments)


def test_a_server_that_was_not_started_for_them_says_how_to():
    with pytest.raises(RequestError) as error:
        read(write_prompts(ROWS), num_specialists=0)

    assert """vllm serve MODEL --additional-config '{"own_prompts": true}'""" in str(error.value)


def test_the_engines_prompt_is_as_long_as_the_longest():
    check_length(ROWS, 3)

    with pytest.raises(RequestError, match="has 2 tokens, but the longest of prompt_ids has 3"):
        check_length(ROWS, 2)


def test_a_client_needs_the_folder_and_no_weights(tmp_path: Path):
    model, tokenizer = make_fused(), make_tokenizer()
    folder = save_fused(model, tmp_path / "model", tokenizer=tokenizer)
    (folder / "model.safetensors").unlink()

    request = vllm_request(prompt_encoder(folder), ASKED)

    rows = FusedGenerator(model, tokenizer).encoder.encode_prompt(ASKED)
    assert len(set(map(len, rows))) > 1, "templates of one length would prove nothing"
    assert read(request["extra_body"]["vllm_xargs"], vocab_size=262) == rows
    assert request["prompt"] == list(max(rows, key=len))
    assert request.keys() == {"prompt", "extra_body"}


def test_a_model_of_which_one_answers_reads_its_prompt_alone(tmp_path: Path):
    folder = save_fused(make_fused(solo="code"), tmp_path / "model", tokenizer=make_tokenizer())

    (lengths,) = vllm_request(prompt_encoder(folder), ASKED)["extra_body"]["vllm_xargs"]["prompt_lengths"]

    rows = FusedGenerator(make_fused(), make_tokenizer()).encoder.encode_prompt(ASKED)
    assert lengths == len(rows[1])


def test_a_model_without_templates_has_nothing_to_write(tmp_path: Path):
    folder = save_fused(make_fused(templates=None), tmp_path / "model", tokenizer=make_tokenizer())

    with pytest.raises(ModelError, match="has no templates"):
        prompt_encoder(folder)


def test_a_conversation_that_waits_for_nothing_is_refused():
    encoder = FusedGenerator(make_fused(), make_tokenizer()).encoder

    with pytest.raises(DataError):
        vllm_request(encoder, (*ASKED, Message("assistant", "four")))
