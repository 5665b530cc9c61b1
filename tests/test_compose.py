"""Composed records: both questions, both answers, in order."""

from ultrafuser.chat.messages import Message
from ultrafuser.data.compose import compose

FIRST = (Message("user", "a name?"), Message("assistant", "Ann"))
SECOND = (Message("user", "1 + 1?"), Message("assistant", "2"))


def test_both_questions_are_asked_then_both_answers_given():
    assert compose(FIRST, SECOND) == (Message("user", "a name?\n1 + 1?"), Message("assistant", "Ann\n2"))


def test_the_order_is_that_of_the_arguments():
    assert compose(SECOND, FIRST)[1].content == "2\nAnn"


def test_of_a_longer_conversation_the_first_turn_is_taken_and_no_system_message():
    longer = (Message("system", "be brief"), *FIRST, Message("user", "and?"), Message("assistant", "no"))

    assert compose(longer, SECOND) == compose(FIRST, SECOND)


def test_the_separator_can_be_chosen():
    assert compose(FIRST, SECOND, separator=" | ")[0].content == "a name? | 1 + 1?"
