"""A Generator as a model of lm-eval: batch, order and padding decide nothing, and n = 1 is lm-eval's own HF model."""

import math
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from helpers import make_fused, make_mixed, make_model, make_tokenizer
from ultrafuser.chat.messages import Message
from ultrafuser.errors import ConfigError, DataError, ModelError
from ultrafuser.evaluation.digest import generator_digest
from ultrafuser.evaluation.journal import Journal
from ultrafuser.evaluation.lm import GeneratorLM
from ultrafuser.evaluation.questions import read_context, write_context
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.generator import FusedGenerator

PAIRS = [
    ("The sky is", " blue"),
    ("The sky is", " a very deep green today"),
    ("Two and two", " make four."),
    ("", "Alone"),
    ("x " * 40, "y"),
    ("Ends with a space ", "here"),
]


def request(kind: str, *arguments: object, task: str = "t") -> Instance:
    return Instance(kind, {}, arguments, 0, (task, 0, 1))


def scored(pairs: list[tuple[str, str]]) -> list[Instance]:
    return [request("loglikelihood", *pair) for pair in pairs]


def asked(texts: list[str], **options: object) -> list[Instance]:
    options = {"until": [], "max_gen_toks": 8, "do_sample": False} | options
    return [request("generate_until", text, options) for text in texts]


def chat(question: str) -> str:
    return write_context((Message("user", question),))


@pytest.fixture(scope="module")
def fused() -> FusedGenerator:
    return FusedGenerator(make_fused(make_mixed()), make_tokenizer())


@pytest.fixture(scope="module")
def single():
    """One model as a fusion of one, and as lm-eval's own."""
    model, tokenizer = make_model(seed=3), make_tokenizer()
    fused = FusedForCausalLM.from_specialists({"only": model}, templates="chatml", tokenizer=tokenizer)
    return GeneratorLM(FusedGenerator(fused, tokenizer)), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)


def test_a_conversation_comes_back_from_its_context():
    conversation = (Message("system", "s"), Message("user", "q\u2028\x1e"))
    assert read_context(write_context(conversation)) == conversation
    assert read_context('[{"role": "user", "content": "plain text"}]') is None


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_scores_do_not_depend_on_batch_size_or_order(fused: FusedGenerator, batch_size: int):
    pairs = [*PAIRS, (chat("Is it so?"), "Yes"), (chat("Is it so? " * 9), "No")]
    alone = [GeneratorLM(fused, batch_size=1).loglikelihood([one])[0] for one in scored(pairs)]

    found = GeneratorLM(fused, batch_size=batch_size).loglikelihood(scored(pairs[::-1]))[::-1]

    for (value, greedy), (expected, expected_greedy) in zip(found, alone, strict=True):
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy


@pytest.mark.parametrize("pad_id", [0, 7, 200])
def test_padding_decides_nothing(fused: FusedGenerator, pad_id: int):
    prompts = [((5, 6, 7),) * 3, (tuple(range(5, 60)), (9, 10), (11,))]
    answers = [(20, 21, 22), (23,)]
    expected = [fused.score_continuations([p], [a])[0].log_prob for p, a in zip(prompts, answers, strict=True)]

    fused.encoder.__dict__["pad_id"] = pad_id
    try:
        found = fused.score_continuations(prompts, answers)
    finally:
        del fused.encoder.__dict__["pad_id"]

    assert [score.log_prob for score in found] == pytest.approx(expected, abs=1e-4)


def test_scores_are_those_of_the_plain_forward(fused: FusedGenerator):
    prompt, answer = (5, 6, 7, 8), (30, 31)
    logits = fused.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)

    found = fused.score_continuations([(prompt,) * 3], [answer])[0]

    assert found.log_prob == pytest.approx((logits[3, 30] + logits[4, 31]).item(), abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"granularity": "prompt"}, {"weighting": "perplexity"}])
def test_an_answer_scores_as_in_its_conversation_however_weights_are_made(options: dict[str, str]):
    generator = FusedGenerator(make_fused(**options), make_tokenizer())
    conversation = (Message("user", "Name a colour."), Message("assistant", "blue"))
    rows = generator.encoder.encode_prompt(conversation[:1])
    answer = tuple(generator.tokenizer("blue", add_special_tokens=False)["input_ids"])

    alone = generator.score_continuations([rows], [answer])[0].log_prob
    batch = generator.score_continuations([(rows[0][:20],) * 3, rows], [(5, 6, 7, 8, 9, 10), answer])[1].log_prob

    assert alone == pytest.approx(sum(generator.score([conversation])[0].log_probs[:-1]), abs=1e-4)
    assert batch == pytest.approx(alone, abs=1e-4)


def test_an_answer_in_two_steps_is_the_answer_in_one(fused: FusedGenerator):
    lm = GeneratorLM(fused)
    whole, first, second = lm.loglikelihood(scored([("Say", " a b"), ("Say", " a"), ("Say a", " b")]))
    assert whole[0] == pytest.approx(first[0] + second[0], abs=1e-4)


def test_greedy_is_what_greedy_decoding_writes(fused: FusedGenerator):
    prompt = tuple(fused.tokenizer("Go on:")["input_ids"])
    written = fused.complete([prompt], _greedy(5))[0].token_ids

    same, other = fused.score_continuations([(prompt,) * 3] * 2, [written, (*written[:-1], (written[-1] + 1) % 250)])

    assert same.is_greedy
    assert not other.is_greedy


def _greedy(max_tokens: int):
    from ultrafuser.generation import SamplingParams

    return SamplingParams(max_tokens=max_tokens)


def test_one_specialist_scores_as_lm_evals_own_model(single):
    ours, theirs = single
    for (value, greedy), (expected, expected_greedy) in zip(
        ours.loglikelihood(scored(PAIRS)), theirs.loglikelihood(scored(PAIRS), disable_tqdm=True), strict=True
    ):
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy


def test_one_specialist_rolls_and_writes_as_lm_evals_own_model(single):
    ours, theirs = single
    texts = [request("loglikelihood_rolling", "A text to measure."), request("loglikelihood_rolling", "b")]
    assert ours.loglikelihood_rolling(texts) == pytest.approx(
        theirs.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-3
    )
    prompts = ["Q: why?\nA:", "Q: what is the reason for that?\nA:"]
    assert ours.generate_until(asked(prompts)) == theirs.generate_until(asked(prompts), disable_tqdm=True)


def test_texts_longer_than_the_context_roll_as_lm_evals_own_model():
    model, tokenizer = make_model("gpt2", n_positions=16), make_tokenizer()
    fused = FusedForCausalLM.from_specialists({"only": model}, templates="plain", tokenizer=tokenizer)
    ours = GeneratorLM(FusedGenerator(fused, tokenizer))
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    long = [request("loglikelihood_rolling", "A text that is much longer than sixteen tokens.")]
    cut = scored([("A context that is much longer than sixteen", " tokens")])

    assert ours.max_length == theirs.max_length == 16
    assert ours.loglikelihood_rolling(long) == pytest.approx(
        theirs.loglikelihood_rolling(long, disable_tqdm=True), abs=1e-3
    )
    assert ours.loglikelihood(cut)[0][0] == pytest.approx(theirs.loglikelihood(cut, disable_tqdm=True)[0][0], abs=1e-4)
    assert ours.num_cut == 1
    with pytest.raises(DataError, match="at most 16"):
        ours.loglikelihood(scored([("a", "b" * 17)]))
    with pytest.raises(DataError, match="the model reads 16"):
        ours.generate_until(asked([chat("far too long for a context of sixteen")]))


def test_texts_that_were_rolled_are_never_rolled_again(
    fused: FusedGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    texts = [request("loglikelihood_rolling", text) for text in ("A text to measure.", "b", "A text to measure.")]
    told: list[tuple[int, int]] = []
    with Journal(tmp_path / "j") as journal:
        lm = GeneratorLM(
            fused, digest="d", journal=journal, batch_size=1, progress=lambda done, total: told.append((done, total))
        )
        first = lm.loglikelihood_rolling(texts)
        assert len(journal) == 2
        assert [entry["tokens"] for entry in lm.entries("t")] == [len(lm.tok_encode(r.args[0])) for r in texts[:2]]
    monkeypatch.setattr(FusedGenerator, "score_continuations", lambda *_: pytest.fail("a text was rolled twice"))

    with Journal(tmp_path / "j") as journal:
        again = GeneratorLM(fused, digest="d", journal=journal).loglikelihood_rolling(texts)

    assert again == first
    assert first[0] == first[2] < first[1] < 0
    assert told == [(0, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_do_not_depend_on_batch_size_or_order(fused: FusedGenerator, batch_size: int):
    prompts = [
        chat("Why?"),
        chat("What is the meaning of this? " * 3),
        chat("Who?"),
        "plain text",
        "more plain text here",
    ]
    alone = [GeneratorLM(fused, batch_size=1).generate_until([one])[0] for one in asked(prompts)]

    found = GeneratorLM(fused, batch_size=batch_size).generate_until(asked(prompts[::-1]))[::-1]

    assert found == alone


def test_sampled_answers_differ_within_a_prompt_and_not_between_runs(fused: FusedGenerator):
    def sample(batch_size: int, seed: int = 0, prompts: tuple[str, ...] = ("Why?", "Who?")) -> list[str]:
        requests = asked([chat(p) for p in prompts for _ in range(4)], do_sample=True, temperature=1.0)
        return GeneratorLM(fused, batch_size=batch_size, seed=seed).generate_until(requests)

    first = sample(1)
    assert len(set(first)) == 8
    assert sample(5) == first
    assert sample(5, prompts=("Who?", "Why?")) == first[4:] + first[:4]
    assert sample(1, seed=1) != first


def test_samples_differ_when_they_do_not_fit_one_batch(fused: FusedGenerator):
    from ultrafuser.generation import SamplingParams

    small = FusedGenerator(fused.model, fused.tokenizer, batch_tokens=1)
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=3)
    assert len({c.text for c in small.generate([(Message("user", "Why?"),)] * 4, params)}) == 4


def test_a_stop_string_ends_an_answer(fused: FusedGenerator):
    whole = GeneratorLM(fused).generate_until(asked(["Go on:"]))[0]
    stop = whole[3:5]
    assert GeneratorLM(fused).generate_until(asked(["Go on:"], until=[stop]))[0] == whole[: whole.index(stop)]


def test_numbers_that_are_none_are_an_error_and_keep_what_was_done(tmp_path: Path):
    generator = FusedGenerator(make_fused(), make_tokenizer())
    with Journal(tmp_path / "j") as journal:
        lm = GeneratorLM(generator, digest="d", journal=journal, batch_size=1)
        lm.loglikelihood(scored(PAIRS[:1]))
        lm.generate_until(asked([chat("Why?")]))
        with torch.no_grad():
            next(iter(generator.model.specialists.values())).get_output_embeddings().weight[3, 0] = math.nan

        with pytest.raises(ModelError, match="no numbers"):
            lm.loglikelihood(scored(PAIRS[1:2]))
        with pytest.raises(ModelError, match="no numbers"):
            lm.generate_until(asked([chat("Who?")]))
        assert len(journal) == 2


def test_an_impossible_answer_is_kept_as_very_unlikely(tmp_path: Path):
    model = make_model()
    with torch.no_grad():
        model.get_output_embeddings().weight *= 1e30
    fused = FusedForCausalLM.from_specialists({"only": model}, templates="plain", tokenizer=make_tokenizer())
    with Journal(tmp_path / "j") as journal:
        lm = GeneratorLM(FusedGenerator(fused, make_tokenizer()), digest="d", journal=journal)
        assert {value for value, _ in lm.loglikelihood(scored(PAIRS[:3]))} == {-1e9}
    assert b"Infinity" not in (tmp_path / "j").read_bytes()


def test_a_model_never_answers_for_another(fused: FusedGenerator, tmp_path: Path):
    with Journal(tmp_path / "j") as journal:
        for digest in ("one", "other"):
            GeneratorLM(fused, digest=digest, journal=journal).loglikelihood(scored(PAIRS[:2]))
        assert len(journal) == 4
        with pytest.raises(ConfigError, match="needs the digest"):
            GeneratorLM(fused, journal=journal)


def test_a_digest_follows_weights_options_and_templates_and_nothing_else(tmp_path: Path):
    def digest(**options: object) -> str:
        return generator_digest(FusedGenerator(make_fused(**options), make_tokenizer()))  # type: ignore[arg-type]

    first = digest()
    assert digest() == first
    others = [digest(fusion_space="probs"), digest(templates="chatml"), digest(loud=False), digest(solo="code")]
    assert len({first, *others}) == 5
    generator = FusedGenerator(make_fused(), make_tokenizer())
    generator.model.save_pretrained(tmp_path / "m")
    generator.tokenizer.save_pretrained(tmp_path / "m")
    assert generator_digest(FusedGenerator.from_pretrained(str(tmp_path / "m"))) == first


def test_a_task_that_begins_the_answer_is_refused(fused: FusedGenerator):
    with pytest.raises(ConfigError, match="gen_prefix"):
        GeneratorLM(fused).apply_chat_template([{"role": "user", "content": "q"}], add_generation_prompt=False)


def test_an_unknown_generation_option_is_refused(fused: FusedGenerator):
    with pytest.raises(ConfigError, match="num_beams"):
        GeneratorLM(fused).generate_until(asked(["a"], num_beams=4))
