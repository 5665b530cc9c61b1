"""Every published shape becomes the same conversation; what cannot is named by kind."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrafuser.chat.messages import Message
from ultrafuser.data.formats import FORMATS, RecordError, to_conversation
from ultrafuser.errors import ConfigError, DataError

Raw = dict[str, object]

USER = {"role": "user", "content": "Why?"}
ASSISTANT = {"role": "assistant", "content": "Because."}

SHAPES: list[tuple[str, Raw]] = [
    ("messages", {"messages": [USER, ASSISTANT]}),
    ("prompt-completion", {"prompt": " Why?", "completion": "Because.\n"}),
    ("prompt-completion", {"prompt": [USER], "completion": [ASSISTANT]}),
    ("prompt-completion", {"prompt": "Why?", "completion": None, "response": "Because."}),
    ("alpaca", {"instruction": "Why?", "input": "", "output": "Because."}),
    ("alpaca", {"instruction": "Why?", "response": "Because."}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]}),
    ("ultrachat", {"id": "0", "data": ["Why?", "Because."]}),
    ("question-answer", {"question": "Why?", "answer": "Because."}),
    ("question-answer", {"problem": "Why?", "level": 1, "solution": "Because."}),
]


def contents(raw: Raw, file_format: str = "auto") -> list[str]:
    return [message.content for message in to_conversation(raw, file_format=file_format)]


def kind_of(raw: object) -> str:
    with pytest.raises(RecordError) as caught:
        to_conversation(raw)
    return caught.value.kind


@pytest.mark.parametrize(("name", "raw"), SHAPES)
def test_every_shape_is_recognised_and_can_be_forced(name: str, raw: Raw) -> None:
    expected = (Message("user", "Why?"), Message("assistant", "Because."))

    assert to_conversation(raw) == to_conversation(raw, file_format=name) == expected


def test_alpaca_input_follows_the_instruction_after_a_blank_line() -> None:
    assert contents({"instruction": "Sort.", "input": "3 1 2", "output": "1 2 3"}) == ["Sort.\n\n3 1 2", "1 2 3"]
    assert contents({"instruction": "Sort.", "context": "3 1 2", "response": "1 2 3"}) == ["Sort.\n\n3 1 2", "1 2 3"]


def test_gsm8k_answers_lose_their_calculator_annotations_alone() -> None:
    answer = "It is 48/2 = <<48/2=24>>24 and cin >> a << b.\n#### 24"

    assert contents({"question": "?", "answer": answer})[1] == "It is 48/2 = 24 and cin >> a << b.\n#### 24"


@pytest.mark.parametrize("answer", ["(C)", "C", " (C) "])
def test_a_rationale_is_followed_by_the_answer_in_one_wording(answer: str) -> None:
    assert contents({"question": "?", "answer": answer, "rationale": "1+1"})[1] == "1+1\nThe answer is (C)."


def test_the_options_of_original_aqua_belong_to_the_question() -> None:
    raw: Raw = {"question": "1+1?", "options": ["A)1", "B)2"], "rationale": "Count.", "correct": "B"}

    assert contents(raw) == ["1+1?\nOptions:\nA)1\nB)2", "Count.\nThe answer is (B)."]


def test_a_system_field_becomes_the_first_message_and_an_empty_one_is_dropped() -> None:
    assert contents({"system": "Be brief.", "prompt": "a", "completion": "b"}) == ["Be brief.", "a", "b"]
    assert contents({"messages": [{"role": "system", "content": " "}, USER, ASSISTANT]}) == ["Why?", "Because."]


def test_null_fields_count_as_absent() -> None:
    assert contents({"messages": None, "instruction": "a", "output": "b"}) == ["a", "b"]


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        ([USER, ASSISTANT], "unreadable"),
        ("text", "unreadable"),
        ({"prompt": "a", "completion": "\ud800"}, "unreadable"),
        ({}, "unknown format"),
        ({"title": "a"}, "unknown format"),
        ({"messages": "a"}, "malformed"),
        ({"messages": [USER, USER, ASSISTANT]}, "malformed"),
        ({"messages": [ASSISTANT]}, "malformed"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "malformed"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "malformed"),
        ({"conversations": ["a"]}, "malformed"),
        ({"data": ["a", 1]}, "malformed"),
        ({"instruction": 1, "output": "a"}, "malformed"),
        ({"prompt": "a", "completion": [ASSISTANT]}, "malformed"),
        ({"instruction": " ", "input": "", "output": "a"}, "no prompt"),
        ({"messages": []}, "no response"),
        ({"messages": [USER]}, "no response"),
        ({"messages": [USER, ASSISTANT, USER]}, "no response"),
        ({"instruction": "a", "output": "\n"}, "no response"),
        ({"question": "a", "rationale": "b", "answer": ""}, "no response"),
    ],
)
def test_a_record_that_cannot_be_used_is_named_by_kind(raw: object, kind: str) -> None:
    assert kind_of(raw) == kind


def test_an_unknown_format_names_the_keys_found_and_every_format() -> None:
    with pytest.raises(DataError) as caught:
        to_conversation({"title": "a", "body": "b"})

    assert "title, body" in str(caught.value)
    assert all(name in str(caught.value) for name in FORMATS)


def test_a_forced_format_says_which_keys_it_misses() -> None:
    with pytest.raises(DataError, match=r"'alpaca' needs the keys instruction \+ output\|response; found: prompt"):
        to_conversation({"prompt": "a"}, file_format="alpaca")


def test_a_format_that_does_not_exist_is_an_error_of_configuration() -> None:
    with pytest.raises(ConfigError, match="'alpacca'"):
        to_conversation({"prompt": "a"}, file_format="alpacca")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = sorted({key for form in FORMATS.values() for choices in form.keys for key in choices} | {"input", "system"})


@given(st.dictionaries(st.sampled_from(KEYS), JSON_VALUES, max_size=5) | JSON_VALUES)
def test_any_json_is_a_sound_conversation_or_a_record_error(raw: object) -> None:
    try:
        conversation = to_conversation(raw)
    except RecordError:
        return
    roles = [message.role for message in conversation if message.role != "system"]
    assert roles == ["user", "assistant"] * (len(roles) // 2)
    assert roles
    assert all(message.content == message.content.strip() != "" for message in conversation)


@given(
    st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0)
)
def test_ultrachat_sharegpt_and_messages_agree(turns: list[str]) -> None:
    sharegpt = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]

    assert contents({"data": turns}) == contents({"conversations": sharegpt}) == contents({"messages": messages})
