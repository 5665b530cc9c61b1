"""Turns: pieces, responses and end tokens put together are what the template itself writes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrafuser.chat import (
    TEMPLATE_NAMES,
    Conversation,
    Message,
    Template,
    TurnPiece,
    last_turn,
    load_template,
    prompt_text,
    split_prompt,
    split_turns,
)
from ultrafuser.errors import DataError, TemplateError

TEMPLATES = [load_template(name) for name in TEMPLATE_NAMES]
BOS, EOS = "<s>", "</s>"

TWO_TURNS: Conversation = (
    Message("user", "2 + 2?"),
    Message("assistant", "4."),
    Message("user", "3 + 3?"),
    Message("assistant", "6."),
)

contents = st.text(max_size=12) | st.sampled_from(
    [" padded ", "\n", EOS, "<|im_end|>", "{{ x }}", "User: a\nAssistant:"]
)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """An optional system message, then one to four turns."""
    messages = [Message("system", draw(contents))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages += [Message("user", draw(contents)), Message("assistant", draw(contents))]
    return tuple(messages)


def put_together(pieces: Sequence[TurnPiece], end_token: str) -> str:
    return "".join(piece.prompt + piece.response + ("" if piece.hides_end else end_token) for piece in pieces)


def split(template: Template, conversation: Conversation, end_token: str = EOS) -> list[TurnPiece]:
    return split_turns(template, conversation, bos_token=BOS, eos_token=EOS, end_token=end_token)


@settings(deadline=None)
@given(
    conversation=conversations(), template=st.sampled_from(TEMPLATES), end_token=st.sampled_from([EOS, "<|im_end|>"])
)
def test_the_pieces_are_the_templates_own_text(conversation: Conversation, template: Template, end_token: str) -> None:
    """Up to each response exactly; after the last one the template may add its own end of turn and a newline."""
    pieces = split(template, conversation, end_token)

    responses = [index for index, message in enumerate(conversation) if message.role == "assistant"]
    assert [piece.response for piece in pieces] == [conversation[index].content for index in responses]
    for number, index in enumerate(responses):
        before = put_together(pieces[:number], end_token) + pieces[number].prompt
        assert before == template.render(conversation[:index], bos_token=BOS, eos_token=EOS)
    whole = template.render(conversation, bos_token=BOS, eos_token=EOS, add_generation_prompt=False)
    rest = whole.removeprefix(put_together(pieces, end_token))
    assert rest != whole
    assert rest.strip() in ("", EOS, *template.end_of_turn)


@settings(deadline=None)
@given(conversation=conversations(), template=st.sampled_from(TEMPLATES))
def test_generation_reads_what_training_read(conversation: Conversation, template: Template) -> None:
    """The history in a prompt is cut where training cuts it, and gives the prompt's text."""
    pieces = split(template, conversation)
    question = conversation[:-1]

    history, prompt = split_prompt(template, question, bos_token=BOS, eos_token=EOS, end_token=EOS)

    assert history == pieces[:-1]
    assert prompt == pieces[-1].prompt
    assert put_together(history, EOS) + prompt == prompt_text(template, question, bos_token=BOS, eos_token=EOS)


@settings(deadline=None)
@given(conversation=conversations(), template=st.sampled_from(TEMPLATES))
def test_the_last_turn_has_the_history_as_its_prompt(conversation: Conversation, template: Template) -> None:
    piece = last_turn(template, conversation, bos_token=BOS, eos_token=EOS, end_token=EOS)

    assert piece.prompt == prompt_text(template, conversation[:-1], bos_token=BOS, eos_token=EOS)
    assert piece.response == conversation[-1].content
    assert piece.hides_end == split(template, conversation)[-1].hides_end


def test_the_shared_end_token_is_cut_from_the_next_piece() -> None:
    assert split(load_template("ultralm"), TWO_TURNS) == [
        TurnPiece("<s>User: 2 + 2?\nAssistant:", "4.", hides_end=False),
        TurnPiece("\nUser: 3 + 3?\nAssistant:", "6.", hides_end=False),
    ]


def test_a_template_that_ends_turns_in_its_own_way_hides_the_shared_end_token() -> None:
    assert split(load_template("chatml"), TWO_TURNS) == [
        TurnPiece("<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n", "4.", hides_end=True),
        TurnPiece("<|im_end|>\n<|im_start|>user\n3 + 3?<|im_end|>\n<|im_start|>assistant\n", "6.", hides_end=True),
    ]


def test_a_templates_own_end_may_be_the_shared_one() -> None:
    pieces = split(load_template("chatml"), TWO_TURNS, end_token="<|im_end|>")

    assert [piece.hides_end for piece in pieces] == [False, False]
    assert pieces[1].prompt == "\n<|im_start|>user\n3 + 3?<|im_end|>\n<|im_start|>assistant\n"


def test_the_papers_three_share_the_end_token() -> None:
    for name in ("ultralm", "codellama", "wizardmath"):
        assert not any(piece.hides_end for piece in split(load_template(name), TWO_TURNS))


def test_a_conversation_without_a_response_has_no_turns() -> None:
    assert split(load_template("chatml"), TWO_TURNS[:1]) == []


def test_what_follows_the_last_response_is_left_out() -> None:
    assert split(load_template("chatml"), TWO_TURNS[:3]) == split(load_template("chatml"), TWO_TURNS[:2])


def test_two_responses_in_a_row_are_two_turns() -> None:
    conversation = (*TWO_TURNS[:2], TWO_TURNS[3])

    pieces = split(load_template("chatml"), conversation)

    assert [piece.prompt for piece in pieces][1:] == ["<|im_end|>\n<|im_start|>assistant\n"]


REWRITING = {
    "trims responses": "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}",
    "keeps the last message only": "{{ messages[-1].content }}>",
    "counts messages first": "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
}


@pytest.mark.parametrize("source", REWRITING.values(), ids=REWRITING.keys())
def test_a_template_that_changes_earlier_turns_is_an_error(source: str) -> None:
    conversation = (Message("user", "2 + 2?"), Message("assistant", " 4. "), *TWO_TURNS[2:])

    with pytest.raises(TemplateError, match=r"template 'mine' changes earlier turns .*\(turns: last\)"):
        split(Template("mine", source), conversation)


def test_the_error_shows_where_the_text_changes() -> None:
    template = Template("mine", "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}[")

    with pytest.raises(TemplateError, match=r"go on with ' 4\. ' but writes '4\.\]\[3 \+ 3\?\]\['"):
        split(template, (Message("user", "2 + 2?"), Message("assistant", " 4. "), *TWO_TURNS[2:]))


@pytest.mark.parametrize("source", REWRITING.values(), ids=REWRITING.keys())
def test_the_last_turn_works_with_a_template_that_changes_earlier_turns(source: str) -> None:
    template = Template("mine", source)

    piece = last_turn(template, TWO_TURNS, bos_token=BOS, eos_token=EOS, end_token=EOS)

    assert piece == TurnPiece(template.render(TWO_TURNS[:3]), "6.", hides_end=True)


def test_one_turn_needs_no_stable_history() -> None:
    """Nothing follows the only response, so a template may write it as it likes: Llama-2 puts spaces around it."""
    template = Template(
        "llama-2",
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
    )

    assert split(template, TWO_TURNS[:2]) == [TurnPiece("[INST] 2 + 2? [/INST]", "4.", hides_end=True)]


@pytest.mark.parametrize("conversation", [(), TWO_TURNS[:2], (Message("system", "Be brief."),)])
def test_a_prompt_must_end_with_a_user_message(conversation: Conversation) -> None:
    template = load_template("chatml")

    with pytest.raises(DataError, match="must end with a user message"):
        prompt_text(template, conversation, bos_token=BOS, eos_token=EOS)
    with pytest.raises(DataError, match="must end with a user message"):
        split_prompt(template, conversation, bos_token=BOS, eos_token=EOS, end_token=EOS)


def test_a_last_turn_needs_a_response() -> None:
    with pytest.raises(DataError, match="has no assistant message"):
        last_turn(load_template("chatml"), TWO_TURNS[:1], bos_token=BOS, eos_token=EOS, end_token=EOS)
