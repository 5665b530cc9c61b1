"""Conversations to token ids: one prompt piece per specialist, one response shared by all.

The response is tokenised once and closed by one shared end token, so it is the same for every template by
construction (Section 3.1; UltraChat's own trainer tokenises segment by segment for the same reason).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ultrafuser.alignment.plain_text import PlainText
from ultrafuser.chat.messages import Conversation
from ultrafuser.chat.template import Template
from ultrafuser.chat.turns import TurnPiece, last_turn, split_prompt, split_turns
from ultrafuser.errors import DataError, TemplateError

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EncodedTurn:
    """One response and what each specialist reads before it.

    Attributes:
        prompts: Token ids of each specialist's prompt piece, in order.
        response: Token ids of the response, the shared end token last.
        hides_end: Specialists that must not see the end token, since their template ends turns in its own way.
    """

    prompts: tuple[Ids, ...]
    response: Ids
    hides_end: tuple[bool, ...]

    @property
    def num_columns(self) -> int:
        """Columns of a batch that this turn takes: its longest prompt piece and its response."""
        return max(len(prompt) for prompt in self.prompts) + len(self.response)


@dataclass(frozen=True, slots=True)
class EncodedRecord:
    """A conversation as token ids, ready for `collate`."""

    id: str
    domain: str
    turns: tuple[EncodedTurn, ...]

    @property
    def num_columns(self) -> int:
        """Columns of a batch that this record takes."""
        return sum(turn.num_columns for turn in self.turns)

    @property
    def num_response_tokens(self) -> int:
        """Tokens that are trained, end tokens included."""
        return sum(len(turn.response) for turn in self.turns)


class Encoder:
    """Turns conversations into ids for n templates over one tokenizer.

    Args:
        tokenizer: The shared tokenizer; its EOS closes every response.
        templates: One per specialist, in order.

    Raises:
        DataError: The tokenizer has no EOS token.
    """

    def __init__(self, tokenizer: Any, templates: Sequence[Template]) -> None:
        if tokenizer.eos_token is None:
            raise DataError("the tokenizer has no end token (eos_token): set one, so that responses can end")
        self.tokenizer = tokenizer
        self.templates = tuple(templates)
        self._numbers: dict[int, int] = {}

    @cached_property
    def end_id(self) -> int:
        """Id of the shared end token."""
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def pad_id(self) -> int:
        """Id that fills padding; never seen, since its mask is 0."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else self.end_id

    def encode(self, conversation: Conversation, *, id: str, domain: str, turns: str = "all") -> EncodedRecord:
        """Encode a conversation to train on or to score.

        Args:
            conversation: Ends with an assistant message.
            id: Names the record in errors and logs.
            domain: Its domain.
            turns: "all" responses count, or the "last" alone, with what is before it as its prompt.

        Raises:
            DataError: No response, or an empty prompt.
            TemplateError: A template cannot write it, or changes earlier turns.
        """
        written = {
            template: self._pieces(template, conversation, last=turns == "last")
            for template in dict.fromkeys(self.templates)  # specialists may share a template: it is written once
        }
        pieces = [written[template] for template in self.templates]
        if not pieces[0]:
            raise DataError(f"record {id} has no response: nothing to train on")
        if turns == "last":
            rows = [[(row[:-1], row[-1])] for row in pieces]
        else:
            rows = [[([], piece) for piece in row] for row in pieces]
        encoded = tuple(
            EncodedTurn(
                prompts=tuple(self._join(before, piece.prompt, self._ids) for before, piece in turn),
                response=(*self._ids(turn[0][1].response), self.end_id),
                hides_end=tuple(piece.hides_end for _, piece in turn),
            )
            for turn in zip(*rows, strict=True)
        )
        for number, turn in enumerate(encoded, start=1):
            self._check_prompts(turn.prompts, f"record {id}, response {number}")
        return EncodedRecord(id=id, domain=domain, turns=encoded)

    def encode_prompt(self, conversation: Conversation, *, plain: bool = False) -> tuple[Ids, ...]:
        """Encode a conversation that waits for an answer: one row of ids per specialist.

        Piece by piece, so that the history has the same tokens as in training.

        Args:
            conversation: Ends with a user message.
            plain: What messages write like a control token is text (`PlainText`): for messages of strangers.

        Raises:
            DataError: It does not end with a user message, or its prompt is empty.
            TemplateError: A template cannot write it.
        """
        encode = self._plain_ids if plain else self._ids
        conversation = self._plain_text.mark(conversation) if plain else conversation
        names = self._special_names()
        rows = [self._join(*split_prompt(template, conversation, **names), encode) for template in self.templates]
        self._check_prompts(rows, "a conversation to answer")
        return tuple(rows)

    def _pieces(self, template: Template, conversation: Conversation, *, last: bool) -> list[TurnPiece]:
        """All turns; where the `last` alone counts, that one will do if the template changes those before it."""
        names = self._special_names()
        try:
            return split_turns(template, conversation, **names)
        except TemplateError:
            if not last:
                raise
            return [last_turn(template, conversation, **names)]

    def _join(self, pieces: Sequence[TurnPiece], prompt: str, encode: Callable[[str], Ids]) -> Ids:
        """Tokens of answered turns and of the prompt after them, piece by piece in training and in generation."""
        ids: list[int] = []
        for piece in pieces:
            end = () if piece.hides_end else (self.end_id,)
            ids += [*encode(piece.prompt), *encode(piece.response), *end]
        return (*ids, *encode(prompt))

    def _check_prompts(self, prompts: Sequence[Ids], what: str) -> None:
        for template, prompt in zip(self.templates, prompts, strict=True):
            if not prompt:
                raise DataError(
                    f"{what}: template {template.name!r} writes nothing before the response, so there is nothing to "
                    "predict it from: give it a user message"
                )

    def _ids(self, text: str) -> Ids:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        # Equal ids become one object: a token of a record then takes 8 bytes of memory, and not 36.
        return tuple([self._numbers.setdefault(index, index) for index in ids])

    def _plain_ids(self, text: str) -> Ids:
        return self._plain_text.encode(text, self._ids)

    @cached_property
    def _plain_text(self) -> PlainText:
        return PlainText(self.tokenizer)

    def _special_names(self) -> dict[str, str]:
        eos = self.tokenizer.eos_token
        return {"bos_token": self.tokenizer.bos_token or "", "eos_token": eos, "end_token": eos}
