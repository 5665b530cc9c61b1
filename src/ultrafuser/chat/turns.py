"""Turns: a conversation cut where each response begins and ends, so that several templates can share the responses.

A specialist reads its prompt piece, then the response that all specialists share, then the shared end token, then its
next piece. Put together again they are exactly what its own template writes: where the template ends a turn otherwise
than with the shared end token, that token is hidden from the specialist and the own ending opens the next piece.

Source: Ding et al. 2024 (arXiv 2403.08281), Section 3.1: fusion on response tokens alone, one template per specialist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ultrafuser.chat.messages import Conversation
from ultrafuser.chat.template import Template
from ultrafuser.errors import DataError, TemplateError


@dataclass(frozen=True, slots=True)
class TurnPiece:
    """One turn as one specialist reads it.

    Attributes:
        prompt: The text between the previous response (and its end token, unless hidden) and this response.
        response: The assistant's content, verbatim.
        hides_end: The template does not write the shared end token here, so this specialist must not see it.
    """

    prompt: str
    response: str
    hides_end: bool


def split_turns(
    template: Template, conversation: Conversation, *, bos_token: str, eos_token: str, end_token: str
) -> list[TurnPiece]:
    """Cut a conversation into one piece per assistant message.

    A prompt ends as the template ends it to make the model answer, so training and generation read the same.

    Args:
        template: The specialist's.
        conversation: Any conversation; what follows the last response is left out.
        bos_token: Text of the tokenizer's BOS; empty for none.
        eos_token: Text of the tokenizer's EOS; empty for none.
        end_token: Text of the one token that training puts after every response, normally `eos_token`.

    Raises:
        TemplateError: The template cannot write this conversation, or changes its earlier turns as it grows.
    """
    responses = _responses(conversation)
    if not responses:
        return []
    last = responses[-1]
    names = {"bos_token": bos_token, "eos_token": eos_token}
    texts = _texts(template, conversation[:last], **names)
    pieces, prompt = _split(template, conversation[:last], texts, end_token=end_token)
    hides_end = _hides_end(template, conversation[: last + 1], texts[-1], end_token=end_token, **names)
    return [*pieces, TurnPiece(prompt, conversation[last].content, hides_end)]


def last_turn(
    template: Template, conversation: Conversation, *, bos_token: str, eos_token: str, end_token: str
) -> TurnPiece:
    """Take the last assistant message as the only response and everything before it as its prompt.

    It works with any template, also with one that changes earlier turns. Arguments as in `split_turns`.

    Raises:
        DataError: The conversation has no assistant message.
        TemplateError: The template cannot write this conversation.
    """
    responses = _responses(conversation)
    if not responses:
        raise DataError(f"a conversation of {len(conversation)} messages has no assistant message, so no response")
    last = responses[-1]
    prompt = template.render(conversation[:last], bos_token=bos_token, eos_token=eos_token)
    hides_end = _hides_end(
        template, conversation[: last + 1], prompt, bos_token=bos_token, eos_token=eos_token, end_token=end_token
    )
    return TurnPiece(prompt, conversation[last].content, hides_end)


def split_prompt(
    template: Template, conversation: Conversation, *, bos_token: str, eos_token: str, end_token: str
) -> tuple[list[TurnPiece], str]:
    """Cut a conversation that waits for an answer into its answered turns and the prompt of the answer.

    Tokenised piece by piece, the history has the same tokens in generation as in training, which `prompt_text` cannot
    promise where a token would span a border. Arguments as in `split_turns`.

    Raises:
        DataError: The conversation does not end with a user message.
        TemplateError: The template cannot write this conversation, or changes its earlier turns as it grows.
    """
    _check_waits_for_answer(conversation)
    texts = _texts(template, conversation, bos_token=bos_token, eos_token=eos_token)
    return _split(template, conversation, texts, end_token=end_token)


def prompt_text(template: Template, conversation: Conversation, *, bos_token: str, eos_token: str) -> str:
    """Write a conversation that waits for an answer as one text, ending with what makes the model answer.

    Raises:
        DataError: The conversation does not end with a user message.
        TemplateError: The template cannot write this conversation.
    """
    _check_waits_for_answer(conversation)
    return template.render(conversation, bos_token=bos_token, eos_token=eos_token)


def _texts(template: Template, conversation: Conversation, *, bos_token: str, eos_token: str) -> list[str]:
    """What the template writes before each response of a conversation, and of all of it."""
    stops = (*_responses(conversation), len(conversation))
    return [template.render(conversation[:stop], bos_token=bos_token, eos_token=eos_token) for stop in stops]


def _hides_end(
    template: Template, closed: Conversation, prompt: str, *, bos_token: str, eos_token: str, end_token: str
) -> bool:
    """Whether a conversation whose last message is a response goes on otherwise than by the shared end token."""
    text = template.render(closed, bos_token=bos_token, eos_token=eos_token, add_generation_prompt=False)
    return not text.startswith(prompt + closed[-1].content + end_token)


def _split(
    template: Template, conversation: Conversation, texts: Sequence[str], *, end_token: str
) -> tuple[list[TurnPiece], str]:
    """Answered turns of a conversation and the prompt after them; `texts` as `_texts` writes it."""
    responses = _responses(conversation)
    pieces: list[TurnPiece] = []
    prompt = texts[0]
    for index, before, after in zip(responses, texts, texts[1:], strict=False):
        response = conversation[index].content
        rest = _rest_after(template, before + response, after)
        pieces.append(TurnPiece(prompt, response, hides_end=not rest.startswith(end_token)))
        prompt = rest.removeprefix(end_token)
    return pieces, prompt


def _rest_after(template: Template, beginning: str, text: str) -> str:
    if text.startswith(beginning):
        return text[len(beginning) :]
    length = min(len(beginning), len(text))
    same = next((i for i in range(length) if beginning[i] != text[i]), length)
    raise TemplateError(
        f"template {template.name!r} changes earlier turns when the conversation grows: it should go on with "
        f"{beginning[same : same + 30]!r} but writes {text[same : same + 30]!r}. "
        "Train on the last turn only (turns: last), or choose a template that keeps the history as it was."
    )


def _responses(conversation: Conversation) -> list[int]:
    return [index for index, message in enumerate(conversation) if message.role == "assistant"]


def _check_waits_for_answer(conversation: Conversation) -> None:
    if not conversation or conversation[-1].role != "user":
        ending = f"a message of the {conversation[-1].role}" if conversation else "nothing: it is empty"
        raise DataError(f"a conversation to answer must end with a user message, this one ends with {ending}")
