"""Each specialist reads exactly its own template's text, and all share one response, whatever the conversation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import make_tokenizer
from ultrafuser.alignment.collate import collate, left_pad, micro_batches
from ultrafuser.alignment.encode import EncodedRecord, EncodedTurn, Encoder
from ultrafuser.chat.library import TEMPLATE_NAMES, load_template
from ultrafuser.chat.messages import Conversation, Message
from ultrafuser.chat.template import Template
from ultrafuser.errors import DataError

TOKENIZER = make_tokenizer()
NAMES = st.lists(st.sampled_from(TEMPLATE_NAMES), min_size=1, max_size=4)
TEXT = st.text(st.characters(codec="ascii", categories=["L", "N", "P", "Zs"]), min_size=1, max_size=12).filter(
    lambda text: text.strip() == text
)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    system = [Message("system", draw(TEXT))] if draw(st.booleans()) else []
    turns = draw(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
    pairs = [message for q, a in turns for message in (Message("user", q), Message("assistant", a))]
    return (*system, *pairs)


def make_encoder(*names: str) -> Encoder:
    return Encoder(TOKENIZER, [load_template(name) for name in names])


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def record(name: str, *lengths: tuple[int, int]) -> EncodedRecord:
    turns = tuple(EncodedTurn(((7,) * p, (8,) * (p + 1)), (9,) * r, (False, False)) for p, r in lengths)
    return EncodedRecord(name, "text", turns)


@settings(deadline=None, max_examples=30)
@given(names=NAMES, group=st.lists(conversations(), min_size=1, max_size=3))
def test_what_a_specialist_sees_is_its_own_templates_rendering(names: list[str], group: list[Conversation]):
    encoder = make_encoder(*names)

    batch = collate([encoder.encode(c, id=str(i), domain="d") for i, c in enumerate(group)], pad_id=encoder.pad_id)

    for b, conversation in enumerate(group):
        for n, template in enumerate(encoder.templates):
            seen = batch.specialist_input_ids[b, n][batch.specialist_attention_mask[b, n] == 1].tolist()
            prompt = template.render(conversation[:-1], bos_token="<s>", eos_token="</s>")
            text = prompt + conversation[-1].content
            assert seen[: len(ids(text))] == ids(text)
            closed = template.render(conversation, bos_token="<s>", eos_token="</s>", add_generation_prompt=False)
            assert seen[len(ids(text)) :] == ([2] if closed.startswith(text + "</s>") else [])


@settings(deadline=None, max_examples=30)
@given(names=NAMES, group=st.lists(conversations(), min_size=1, max_size=3))
def test_labels_are_the_shared_responses_and_every_specialist_sees_them_there(
    names: list[str], group: list[Conversation]
):
    encoder = make_encoder(*names)

    batch = collate([encoder.encode(c, id=str(i), domain="d") for i, c in enumerate(group)], pad_id=encoder.pad_id)

    assert batch.num_response_tokens == int((batch.labels != -100).sum())
    for b, conversation in enumerate(group):
        responses = [[*ids(m.content), 2] for m in conversation if m.role == "assistant"]
        trained = batch.labels[b] != -100
        assert batch.labels[b][trained].tolist() == [token for response in responses for token in response]
        for n in range(len(names)):
            assert torch.equal(batch.specialist_input_ids[b, n][trained], batch.labels[b][trained])
            hidden = trained & (batch.specialist_attention_mask[b, n] == 0)
            assert (batch.labels[b][hidden] == encoder.end_id).all()
            # The column that predicts a response token is one the specialist sees.
            predicting = torch.cat([trained[1:], torch.tensor([False])])
            assert (batch.specialist_attention_mask[b, n][predicting] == 1).all()


@settings(deadline=None, max_examples=30)
@given(names=NAMES, conversation=conversations())
def test_a_prompt_has_the_tokens_that_training_had_before_the_last_response(
    names: list[str], conversation: Conversation
):
    encoder = make_encoder(*names)
    batch = collate([encoder.encode(conversation, id="0", domain="d")], pad_id=encoder.pad_id)

    prompt = encoder.encode_prompt(conversation[:-1])

    start = len(batch.labels[0]) - len(ids(conversation[-1].content)) - 1
    for n, row in enumerate(prompt):
        seen = batch.specialist_attention_mask[0, n, :start] == 1
        assert list(row) == batch.specialist_input_ids[0, n, :start][seen].tolist()


@pytest.mark.parametrize("turns", ["all", "last"])
def test_no_token_spans_the_border_of_a_response(turns: str):
    """Written as one text, `:y` of `Assistant:yes` would be one token, and another one in each template."""
    tokenizer = make_tokenizer(merges=[(end, "y") for end in (":", "]", "Ċ", "Ġ", ">", "n")])
    encoder = Encoder(tokenizer, [load_template(name) for name in TEMPLATE_NAMES])
    messages = tuple(Message(role, text) for role, text in (("user", "can"), ("assistant", "yes")) * 2)
    for template in encoder.templates:
        text = template.render(messages[:1], bos_token="<s>", eos_token="</s>") + "yes"
        assert tokenizer(text, add_special_tokens=False)["input_ids"][-3:] != ids("yes"), template.name

    encoded = encoder.encode(messages, id="0", domain="d", turns=turns)

    assert {turn.response for turn in encoded.turns} == {(*ids("yes"), encoder.end_id)}
    batch = collate([encoded], pad_id=encoder.pad_id)
    start = len(batch.labels[0]) - len("yes") - 1
    for n, prompt in enumerate(encoder.encode_prompt(messages[:-1])):
        seen = batch.specialist_attention_mask[0, n, :start] == 1
        assert list(prompt) == batch.specialist_input_ids[0, n, :start][seen].tolist()


def test_equal_tokens_are_one_object_in_all_records():
    """Millions of records are in memory as ids: a pointer for each, and not a number of 28 bytes as well."""
    encoder = make_encoder("ultralm", "chatml")
    text = "\u00ad\u2003"  # bytes whose ids are beyond the small numbers that Python keeps

    records = [
        encoder.encode((Message("user", text * i), Message("assistant", text)), id=str(i), domain="d") for i in (1, 2)
    ]

    tokens = [token for record in records for turn in record.turns for ids in turn.prompts for token in ids]
    tokens += [token for record in records for turn in record.turns for token in turn.response]
    assert max(tokens) > 256
    assert len({id(token) for token in tokens}) == len(set(tokens))


def test_a_record_has_no_columns_to_spare():
    encoder = make_encoder("ultralm", "wizardmath")
    conversation = (Message("user", "hi"), Message("assistant", "yes"))

    encoded = encoder.encode(conversation, id="0", domain="d")

    assert encoded.num_columns == collate([encoded], pad_id=0).labels.shape[1]
    assert encoded.num_columns == max(len(p) for p in encoded.turns[0].prompts) + len("yes") + 1


def test_only_the_last_response_counts_where_asked_for():
    encoder = make_encoder("ultralm")
    conversation = tuple(Message(role, text) for role, text in (("user", "a"), ("assistant", "b")) * 2)

    encoded = encoder.encode(conversation, id="0", domain="d", turns="last")

    assert len(encoded.turns) == 1
    assert encoded.turns[0].prompts == encoder.encode_prompt(conversation[:-1])


def test_the_last_response_may_follow_a_history_that_a_template_writes_anew():
    encoder = Encoder(TOKENIZER, [Template("mine", "{{ messages | length }}{{ messages[-1].content }}>")])
    conversation = tuple(Message(role, text) for role, text in (("user", "a"), ("assistant", "b")) * 2)

    (turn,) = encoder.encode(conversation, id="0", domain="d", turns="last").turns

    assert turn.prompts == (tuple(ids("3a>")),)


@pytest.mark.parametrize("names", [("plain",), ("chatml", "plain")])
def test_a_response_with_nothing_before_it_is_refused(names: tuple[str, ...]):
    """A tokenizer without BOS and a template without words leave nothing to predict the first token from."""
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    encoder = Encoder(tokenizer, [load_template(name) for name in names])

    with pytest.raises(DataError, match="record 7, response 1: template 'plain' writes nothing before the response"):
        encoder.encode((Message("user", ""), Message("assistant", "b")), id="7", domain="d")
    with pytest.raises(DataError, match="writes nothing before the response"):
        encoder.encode_prompt((Message("user", ""),))


def test_a_conversation_without_a_response_is_refused():
    with pytest.raises(DataError, match="record 7 has no response"):
        make_encoder("chatml").encode((Message("user", "a"),), id="7", domain="d")


def test_a_tokenizer_without_an_end_token_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None

    with pytest.raises(DataError, match="no end token"):
        Encoder(tokenizer, [])


def test_prompts_of_different_lengths_all_end_in_the_same_column():
    inputs = left_pad([((5, 6), (7,)), ((8,), (9, 10, 11))], pad_id=0)

    assert inputs["specialist_input_ids"].tolist() == [[[0, 5, 6], [0, 0, 7]], [[0, 0, 8], [9, 10, 11]]]
    assert inputs["specialist_attention_mask"].tolist() == [[[0, 1, 1], [0, 0, 1]], [[0, 0, 1], [1, 1, 1]]]
    assert torch.equal(inputs["input_ids"], inputs["specialist_input_ids"][:, 0])
    assert torch.equal(inputs["attention_mask"], inputs["specialist_attention_mask"][:, 0])


LENGTHS = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(lengths=st.lists(st.lists(LENGTHS, min_size=1, max_size=2), max_size=12), limit=st.integers(1, 80))
def test_micro_batches_cut_all_records_within_the_limit(lengths: list[list[tuple[int, int]]], limit: int):
    records = [record(f"{i:03d}", *turns) for i, turns in enumerate(lengths)]

    pieces = list(micro_batches(records, max_columns=limit))

    assert sorted(r.id for piece in pieces for r in piece) == [r.id for r in records]
    for piece in pieces:
        assert len(piece) == 1 or len(piece) * max(r.num_columns for r in piece) <= limit


@given(lengths=st.lists(LENGTHS, min_size=1, max_size=12), limit=st.integers(1, 80), seed=st.randoms())
def test_micro_batches_do_not_depend_on_the_order_of_records(lengths: list[tuple[int, int]], limit: int, seed):
    records = [record(f"{i:03d}", turn) for i, turn in enumerate(lengths)]
    shuffled = seed.sample(records, k=len(records))

    assert list(micro_batches(records, max_columns=limit)) == list(micro_batches(shuffled, max_columns=limit))
