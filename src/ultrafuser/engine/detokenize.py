"""From ids to text, piece by piece: what each token adds, with stop strings and halves of characters held back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ultrafuser.engine.requests import TokenPiece

_UNFINISHED = "\ufffd"  # how a tokenizer shows bytes that are no character yet


class Detokenizer:
    """Text of a growing list of ids, special tokens left out; joined, the pieces are `tokenizer.decode` of all.

    A token is decoded together with those just before it, since a tokenizer may treat the beginning of a text
    in its own way (Llama's drops a space). The cost of a token does not grow with the text.

    Args:
        tokenizer: That wrote the ids.
        alone: Texts of single tokens that were decoded before; may be shared by all of one tokenizer.
    """

    def __init__(self, tokenizer: Any, alone: dict[int, str] | None = None) -> None:
        self.tokenizer = tokenizer
        self._alone: dict[int, str] = {} if alone is None else alone
        self._ids: list[int] = []  # from the last text that was complete, and what led to it
        self._read = 0  # how many of these have been shown
        self._before = ""  # their text

    def copy(self) -> Detokenizer:
        """Another one that has read the same."""
        other = Detokenizer(self.tokenizer, self._alone)
        other._ids, other._read, other._before = list(self._ids), self._read, self._before
        return other

    def push(self, token: int) -> str:
        """What this token adds; empty while a character is incomplete."""
        self._ids.append(token)
        before, now = self._before, self._decode(self._ids)
        if len(now) <= len(before) or now.endswith(_UNFINISHED):
            return ""
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        self._before = self._decode(self._ids)
        return now[len(before) :]

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character."""
        before, self._before = self._before, self._decode(self._ids)
        self._read = len(self._ids)
        return self._before[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        if len(ids) != 1:
            return str(self.tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""
        (token,) = ids
        if token not in self._alone:
            self._alone[token] = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return self._alone[token]


class HeldPieces:
    """Holds pieces back while their text may be the beginning of a stop string, or is not there yet.

    Args:
        stops: The stop strings, none empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self._held: list[TokenPiece] = []

    def push(self, piece: TokenPiece) -> tuple[list[TokenPiece], bool]:
        """Pieces that may be shown now, and whether a stop string is complete; what comes after it is cut off."""
        if piece.text and not self.stops and not self._held:
            return [piece], False
        self._held.append(piece)
        if not piece.text:  # in the middle of a character
            return [], False
        text = "".join(held.text for held in self._held)
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            return self._release(min(found), rest=True), True
        safe = len(text) - max((_overlap(text, stop) for stop in self.stops), default=0)
        return self._release(safe, rest=False), False

    def flush(self, rest: str = "") -> list[TokenPiece]:
        """What is held, when no more will come; `rest` is text that the last of them turned out to have."""
        held, self._held = self._held, []
        if held and rest:
            held[-1] = replace(held[-1], text=held[-1].text + rest)
        return held

    def _release(self, length: int, *, rest: bool) -> list[TokenPiece]:
        """Pieces of the first `length` characters; with `rest` all others follow, without their text."""
        shown: list[TokenPiece] = []
        while self._held and (rest or len(self._held[0].text) <= length):
            piece = self._held.pop(0)
            shown.append(piece if len(piece.text) <= length else replace(piece, text=piece.text[:length]))
            length -= len(shown[-1].text)
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
