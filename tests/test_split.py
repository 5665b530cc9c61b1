"""A split is decided by content alone, so nothing leaks and nothing moves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrafuser.chat.messages import Conversation, Message
from ultrafuser.data.records import Record, content_id
from ultrafuser.data.split import SPLITS, prompt_key, split_of, split_records
from ultrafuser.errors import ConfigError

KEYS = [str(n) for n in range(4000)]


def make_record(*contents: str, system: str | None = None, domain: str = "text") -> Record:
    turns = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(contents))
    messages: Conversation = (Message("system", system), *turns) if system else turns
    return Record(content_id(messages), messages, domain, "made")


def test_two_answers_to_one_question_never_straddle_two_splits() -> None:
    keys = {
        prompt_key(record)
        for record in (
            make_record("What is 2 + 2?", "4"),
            make_record("What is 2 + 2?", "Four.", "Sure?", "Yes."),
            make_record("what is  2+2", "4", system="Be brief.", domain="math"),
        )
    }

    assert len(keys) == 1
    assert prompt_key(make_record("What is 2 + 3?", "4")) not in keys


def test_prompts_without_words_are_told_apart() -> None:
    assert prompt_key(make_record("?!", "a")) != prompt_key(make_record("...", "a"))


def test_the_split_of_a_key_is_fixed_for_good() -> None:
    """Pinned: another outcome would mix up every split made so far."""
    places = [SPLITS.index(split_of(key, validation=0.25, test=0.25)) for key in KEYS]

    assert "".join(map(str, places[:24])) == "100102000001010111110020"
    assert [places.count(place) for place in range(3)] == [1984, 1030, 986]


@given(st.text(), st.text(), st.floats(0, 0.5), st.floats(0, 0.5))
def test_larger_shares_only_take_from_training(key: str, salt: str, validation: float, test: float) -> None:
    before = split_of(key, validation=validation / 2, test=test / 2, salt=salt)
    after = split_of(key, validation=validation, test=test, salt=salt)

    assert before in ("train", after)


def test_shares_come_out_about_right_and_another_salt_draws_others() -> None:
    drawn = [[split_of(key, validation=0.1, test=0.2, salt=salt) for key in KEYS] for salt in ("", "other")]

    for splits in drawn:
        assert [splits.count(split) / len(KEYS) for split in SPLITS] == pytest.approx([0.7, 0.1, 0.2], abs=0.02)
    assert drawn[0] != drawn[1]


def test_shares_of_nothing_and_of_everything_hold_exactly() -> None:
    assert {split_of(key, validation=0.0, test=0.0) for key in KEYS} == {"train"}
    assert {split_of(key, validation=1.0, test=0.0) for key in KEYS} == {"validation"}
    assert {split_of(key, validation=0.0, test=1.0) for key in KEYS} == {"test"}


@pytest.mark.parametrize(("validation", "test"), [(-0.1, 0.0), (0.0, -0.1), (0.6, 0.6), (float("nan"), 0.0)])
def test_shares_that_are_no_shares_are_refused(validation: float, test: float) -> None:
    with pytest.raises(ConfigError, match="at most 1"):
        split_of("a", validation=validation, test=test)


def test_records_are_dealt_in_order_and_none_is_lost() -> None:
    records = [make_record(f"Question {n % 50}?", str(n)) for n in range(200)]

    dealt = split_records(records, validation=0.2, test=0.2)

    assert list(dealt) == list(SPLITS)
    assert all(part == [record for record in records if record in part] for part in dealt.values())
    assert sum(map(len, dealt.values())) == len(records)
    prompts = [{record.messages[0].content for record in part} for part in dealt.values()]
    assert sum(map(len, prompts)) == 50
