"""`generate()` in every way transformers knows: token for token what an unpadded, uncached greedy loop gives."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, pipeline
from transformers.generation.streamers import BaseStreamer

from helpers import (
    VOCAB_SIZE,
    make_fused,
    make_mixed,
    make_model,
    make_tokenizer,
    make_trio,
    reference_greedy,
    reference_step,
)
from ultrafuser.alignment.collate import collate, left_pad
from ultrafuser.alignment.encode import Encoder, Ids
from ultrafuser.chat.messages import Conversation, Message
from ultrafuser.errors import ModelError
from ultrafuser.generation import SamplingParams
from ultrafuser.model.build import read_templates
from ultrafuser.model.cache import FusedCache
from ultrafuser.model.checkpoint import save_fused
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.generator import FusedGenerator

SHORT = (Message("user", "hi"),)
LONG = (Message("user", "hi"), Message("assistant", "Hello."), Message("user", "What is 2 + 2?"))
NEW = 8  # tokens of each answer
WAYS: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "prefill in chunks": {"prefill_chunk_size": 50},
    "static cache, prefill in chunks": {"prefill_chunk_size": 50, "cache_implementation": "static"},
    "one beam asked for": {"num_beams": 1},
}
ONE_ROW_WAYS: dict[str, dict[str, Any]] = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {"assistant_model": make_model("llama", seed=0)},
    "assisted by another architecture": {"assistant_model": make_model("gpt2", seed=5)},
}


def encode(model: FusedForCausalLM, *conversations: Conversation) -> list[tuple[Ids, ...]]:
    encoder = Encoder(make_tokenizer(), read_templates(model.config))
    return [encoder.encode_prompt(conversation) for conversation in conversations]


def answers(model: FusedForCausalLM, inputs: dict[str, Tensor], **ways: Any) -> list[list[int]]:
    output = model.generate(**inputs, **{"max_new_tokens": NEW, "eos_token_id": None, **ways})
    return output[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("specialists", [make_trio, make_mixed])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_batch_with_templates_of_different_lengths_answers_as_the_reference(specialists, way: dict[str, Any]):
    model = make_fused(specialists())
    prompts = encode(model, SHORT, LONG)

    actual = answers(model, left_pad(prompts, pad_id=0), **way)

    assert actual == [reference_greedy(model, prompt, max_tokens=NEW) for prompt in prompts]
    assert len(set(actual[0])) > 3


@pytest.mark.parametrize("way", [*WAYS.values(), *ONE_ROW_WAYS.values()], ids=[*WAYS.keys(), *ONE_ROW_WAYS.keys()])
def test_one_conversation_answers_as_the_reference(way: dict[str, Any]):
    model = make_fused(make_mixed())
    prompts = encode(model, SHORT)

    actual = answers(model, left_pad(prompts, pad_id=0), **way)

    assert actual == [reference_greedy(model, prompts[0], max_tokens=NEW)]


@pytest.mark.parametrize("way", [*WAYS.values(), *ONE_ROW_WAYS.values()], ids=[*WAYS.keys(), *ONE_ROW_WAYS.keys()])
def test_plain_input_ids_answer_as_the_reference(way: dict[str, Any]):
    """One text for all specialists; rows of different lengths where the way allows more than one row."""
    model = make_fused(make_mixed(), templates=None)
    rows = [list(range(10, 24)), list(range(40, 46))] if way in WAYS.values() else [list(range(10, 24))]
    padded = left_pad([[tuple(row)] for row in rows], pad_id=0)
    inputs = {key: padded[key] for key in ("input_ids", "attention_mask")}

    actual = answers(model, inputs, **way)

    assert actual == [reference_greedy(model, [row] * 3, max_tokens=NEW) for row in rows]


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gemma2", "mistral", "bloom"])
def test_other_architectures_answer_as_the_reference(kind: str):
    window = {"sliding_window": 8} if kind in ("mistral", "gemma2") else {}
    model = make_fused({"text": make_model("llama"), "code": make_model(kind, seed=1, **window)})
    prompts = encode(model, SHORT, LONG)

    # Bloom knows no static cache: its ALiBi is as long as the mask.
    static = [{"cache_implementation": "static"}] if kind != "bloom" else []
    for way in ({}, {"use_cache": False}, *static):
        actual = answers(model, left_pad(prompts, pad_id=0), **way)
        assert actual == [reference_greedy(model, prompt, max_tokens=NEW) for prompt in prompts]


def test_an_answer_ends_at_a_stop_token_and_the_batch_goes_on():
    model = make_fused()
    prompts = encode(model, SHORT, LONG)
    first = reference_greedy(model, prompts[0], max_tokens=NEW)
    stop = first[2]
    assert stop not in first[:2]

    actual = answers(model, left_pad(prompts, pad_id=0), eos_token_id=stop, pad_token_id=0)

    second = reference_greedy(model, prompts[1], max_tokens=NEW, stops=[stop])
    assert actual[0] == [*first[:3], *[0] * (len(second) - 3)]
    assert actual[1] == second


def test_the_stop_tokens_are_the_union_of_all_templates_end_of_turn_tokens():
    model = make_fused(templates=["chatml", "codellama", "wizardmath"])

    assert set(model.generation_config.eos_token_id) == {2, 4}  # </s> and <|im_end|>
    assert model.generation_config.pad_token_id == 0


def test_stop_strings_end_an_answer():
    model, tokenizer = make_fused(), make_tokenizer()
    prompts = encode(model, SHORT)
    expected = reference_greedy(model, prompts[0], max_tokens=NEW)
    printable = next(i for i, token in enumerate(expected) if "\ufffd" not in tokenizer.decode([token]))
    text = tokenizer.decode([expected[printable]])

    actual = answers(model, left_pad(prompts, pad_id=0), stop_strings=[text], tokenizer=tokenizer)

    assert actual == [expected[: printable + 1]]


def test_a_streamer_sees_every_token():
    class Collect(BaseStreamer):
        seen: list[int] = []
        ended = False

        def put(self, value: Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    model, streamer = make_fused(), Collect()
    prompts = encode(model, SHORT)
    inputs = left_pad(prompts, pad_id=0)

    answers(model, inputs, streamer=streamer)

    expected = reference_greedy(model, prompts[0], max_tokens=NEW)
    assert streamer.seen == [*inputs["input_ids"][0].tolist(), *expected]
    assert streamer.ended


def test_sampling_with_a_seed_draws_what_the_reference_draws_from_the_fused_distribution():
    model = make_fused()
    prompts = encode(model, SHORT)
    inputs = left_pad(prompts, pad_id=0)

    def draw() -> list[list[int]]:
        torch.manual_seed(5)
        return answers(model, inputs, do_sample=True, top_k=0)

    torch.manual_seed(5)
    response: list[int] = []
    for _ in range(NEW):
        logits, _ = reference_step(model, [[*prompt, *response] for prompt in prompts[0]])
        response.append(int(torch.multinomial(logits.softmax(dim=0)[None], num_samples=1)))
    assert draw() == draw() == [response]


def reference_beams(model: FusedForCausalLM, prompts: tuple[Ids, ...], *, width: int, tokens: int) -> list[int]:
    """Beam search by hand without stop tokens: keep the `width` likeliest continuations at every step."""
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(tokens):
        grown = []
        for score, response in beams:
            logits, _ = reference_step(model, [[*prompt, *response] for prompt in prompts])
            best = logits.log_softmax(dim=0).topk(width)
            for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                grown.append((score + value, [*response, token]))
        beams = sorted(grown, reverse=True)[:width]
    return beams[0][1]


@pytest.mark.parametrize("way", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_beam_search_finds_what_beam_search_by_hand_finds(way: dict[str, Any]):
    model = make_fused(make_mixed())
    prompts = encode(model, SHORT, LONG)

    actual = answers(model, left_pad(prompts, pad_id=0), num_beams=3, max_new_tokens=5, **way)

    assert actual == [reference_beams(model, prompt, width=3, tokens=5) for prompt in prompts]
    assert actual != [reference_greedy(model, prompt, max_tokens=5) for prompt in prompts]


@pytest.mark.parametrize("options", [{"granularity": "prompt"}, {"weighting": "perplexity"}, {"weighting": "uniform"}])
@pytest.mark.parametrize(
    "way", [{}, {"cache_implementation": "static"}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}]
)
def test_other_weights_are_the_same_with_and_without_a_cache(options: dict[str, str], way: dict[str, Any]):
    model = make_fused(**options)
    inputs = left_pad(encode(model, SHORT), pad_id=0)

    beams = {key: value for key, value in way.items() if key == "num_beams"}
    assert answers(model, inputs, **way) == answers(model, inputs, use_cache=False, **beams)


def test_prompt_granularity_answers_as_a_loop_with_the_prompts_weights():
    model = make_fused(granularity="prompt")
    prompts = encode(model, SHORT)
    _, weights = reference_step(model, prompts[0])
    response: list[int] = []
    with torch.no_grad():
        for _ in range(NEW):
            ids = [torch.tensor([[*prompt, *response]]) for prompt in prompts[0]]
            logits = [s(input_ids=i).logits[0, -1] for s, i in zip(model.specialists.values(), ids, strict=True)]
            response.append(int(sum(w * row for w, row in zip(weights, logits, strict=True)).argmax()))

    assert answers(model, left_pad(prompts, pad_id=0)) == [response]
    assert answers(model, left_pad(prompts, pad_id=0), prefill_chunk_size=20) == [response]


def test_solo_generates_as_that_specialist_alone():
    model = make_fused(make_mixed(), solo="math")
    prompts = encode(model, SHORT)

    actual = answers(model, left_pad(prompts, pad_id=0))

    alone = model.specialists["math"].generate(
        torch.tensor([prompts[0][2]]), max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )
    assert actual == [alone[0, len(prompts[0][2]) :].tolist()]


def test_an_answer_can_go_on_from_a_cache():
    """The second call reads only what the cache does not hold."""
    model = make_fused(make_mixed(), templates=None)
    ids = torch.tensor([list(range(10, 24))])
    first = model.generate(ids, max_new_tokens=3, eos_token_id=None, return_dict_in_generate=True)

    second = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=3, eos_token_id=None)

    assert second[0, 14:].tolist() == reference_greedy(model, [ids[0].tolist()] * 3, max_tokens=6)


def test_the_fused_cache_crops_repeats_and_forgets_for_all_specialists():
    model = make_fused(make_mixed(), templates=None, granularity="prompt")
    ids = torch.randint(5, VOCAB_SIZE, (2, 6))
    cache = model(input_ids=ids, use_cache=True, prompt_length=6).past_key_values
    assert isinstance(cache, FusedCache)
    held = cache.held_scores.clone()

    cache.crop(-2)
    assert {view.get_seq_length() for view in cache.views.values()} == {4}
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.held_scores, held[[0, 0, 1, 1]])
    cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
    assert torch.equal(cache.held_scores, held[[1, 1, 0, 0]])
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert torch.equal(cache.held_scores, held[[1, 0]])
    cache.reset()
    assert cache.held_scores is None


@pytest.mark.slow
def test_a_static_step_is_one_graph_that_is_compiled_once():
    """In a process of its own: the type checks of this one cannot be compiled."""
    script = Path(__file__).with_name("compile_static_step.py")

    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)

    assert result.stdout.split() == ["equal", "True", "graphs", "1"], result.stderr


def test_a_pipeline_writes_text_with_a_saved_model_of_one_plain_template(tmp_path):
    model, tokenizer = make_fused(templates="plain"), make_tokenizer()
    save_fused(model, tmp_path / "fused", tokenizer=tokenizer)

    write = pipeline("text-generation", model=str(tmp_path / "fused"), device="cpu")
    text = write("hello", max_new_tokens=NEW, do_sample=False, return_full_text=False)[0]["generated_text"]

    ids = tokenizer("hello")["input_ids"]
    stops = model.generation_config.eos_token_id
    assert text == tokenizer.decode(
        reference_greedy(model, [ids] * 3, max_tokens=NEW, stops=stops), skip_special_tokens=True
    )


# FusedGenerator

QUESTIONS = [SHORT, LONG, (Message("user", "Write a function that adds."),)]


def make_generator(**options: Any) -> FusedGenerator:
    return FusedGenerator(make_fused(make_mixed()), make_tokenizer(), **options)


def test_completions_are_the_references_answers():
    generator = make_generator()
    model, stops = generator.model, generator.model.generation_config.eos_token_id

    completions = generator.generate(QUESTIONS, SamplingParams(max_tokens=NEW))

    for prompt, completion in zip(encode(model, *QUESTIONS), completions, strict=True):
        expected = reference_greedy(model, prompt, max_tokens=NEW, stops=stops)
        ended = expected[-1] in stops
        assert list(completion.token_ids) == (expected[:-1] if ended else expected)
        assert completion.text == make_tokenizer().decode(completion.token_ids, skip_special_tokens=True)
        assert completion.finish_reason == ("stop" if ended else "length")


def test_a_completion_carries_the_gate_weights_of_every_token():
    generator = make_generator()
    model = generator.model

    (completion,) = generator.generate([LONG], SamplingParams(max_tokens=NEW))

    (prompt,) = encode(model, LONG)
    assert len(completion.gate_weights) == len(completion.token_ids)
    for i, row in enumerate(completion.gate_weights):
        _, weights = reference_step(model, [[*ids, *completion.token_ids[:i]] for ids in prompt])
        torch.testing.assert_close(torch.tensor(row), weights, rtol=1e-4, atol=1e-4)
        assert sum(row) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 400])
def test_how_conversations_are_batched_does_not_change_the_answers(batch_tokens: int):
    params = SamplingParams(max_tokens=NEW)

    alone, together = make_generator(batch_tokens=batch_tokens), make_generator()

    a, b = alone.generate(QUESTIONS, params), together.generate(QUESTIONS, params)
    assert [c.token_ids for c in a] == [c.token_ids for c in b]


def test_a_stop_string_cuts_text_tokens_and_weights_alike_in_a_batch():
    generator, tokenizer = make_generator(), make_tokenizer()
    plain = generator.generate(QUESTIONS, SamplingParams(max_tokens=NEW))
    ids = plain[0].token_ids
    at = next(i for i, token in enumerate(ids) if "\ufffd" not in tokenizer.decode([token]))
    stop = tokenizer.decode([ids[at]])

    completions = generator.generate(QUESTIONS, SamplingParams(max_tokens=NEW, stop=(stop,)))

    assert completions[0].token_ids == ids[: at + 1]
    assert completions[0].text == tokenizer.decode(ids[:at])
    assert completions[0].finish_reason == "stop"
    assert all(len(c.gate_weights) == len(c.token_ids) for c in completions)
    assert all(stop not in c.text for c in completions)


def test_sampled_completions_are_the_same_for_the_same_seed():
    generator = make_generator()
    params = SamplingParams(max_tokens=NEW, temperature=1.5, top_p=0.9, top_k=50, seed=3)

    assert generator.generate(QUESTIONS, params) == generator.generate(QUESTIONS, params)


def test_scores_are_the_nll_of_response_nll():
    generator = make_generator(batch_tokens=300)
    asked = [(*question, Message("assistant", answer)) for question, answer in zip(QUESTIONS, "abc", strict=True)]

    scores = generator.score(asked)

    for conversation, score in zip(asked, scores, strict=True):
        record = generator.encoder.encode(conversation, id="0", domain="")
        with torch.no_grad():
            nll, weights, _ = generator.model.response_nll(**collate([record], pad_id=0).tensors())
        torch.testing.assert_close(-torch.tensor(score.log_probs), nll, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.tensor(score.gate_weights), weights, rtol=1e-4, atol=1e-4)
        assert score.loss == pytest.approx(nll.mean().item(), rel=1e-4)


def test_a_model_without_templates_cannot_read_conversations():
    with pytest.raises(ModelError, match="has no templates"):
        FusedGenerator(make_fused(templates=None), make_tokenizer())


def test_a_cache_that_is_not_fused_is_refused_by_generate():
    model = make_fused(templates=None)

    with pytest.raises(ModelError, match="past_key_values is a DynamicCache"):
        model.generate(torch.tensor([[5, 6]]), past_key_values=DynamicCache(), max_new_tokens=2)
