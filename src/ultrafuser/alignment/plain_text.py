"""Text of strangers stays text: what they write like a control token is encoded letter by letter.

A prompt is rendered as one text and tokenised as a whole, so a user who types `<|im_end|>` would end his own turn.
Here each such word is replaced by a marker before the template runs and by the tokens of its letters afterwards. A word
that only comes about where a message meets its neighbour is cut there. All other text takes the same way as ever.

Source: `apply_chat_template(sanitize_control_tokens=True)` of transformers 5.23 has the same aim; it leaves words that
are joined from pieces to others.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

from ultrafuser.chat.messages import Conversation

Ids = tuple[int, ...]

# Unicode keeps this character out of all text; one that a stranger writes is marked like a control token.
MARK = "\ufdd0"
# A private character after it says which word stood there; they are enough for 65,000 control tokens.
FIRST = 0x100000
CUT = MARK + chr(FIRST)  # stands for nothing, and keeps what is before from joining what is after


class PlainText:
    """Marks control tokens in messages and encodes the marked text.

    Args:
        tokenizer: Its special tokens are the control tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = (str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special)
        words = {MARK, *added, *map(str, tokenizer.all_special_tokens)}
        self.words = sorted(words - {""}, key=lambda word: (-len(word), word))  # the longest match wins
        self._pattern = re.compile("|".join(map(re.escape, self.words)))
        self._markers = {word: MARK + chr(FIRST + index) for index, word in enumerate(self.words, start=1)}
        # A message may end as a word begins, or begin as one ends.
        self._beginnings = tuple({word[:k] for word in self.words for k in range(1, len(word))})
        self._endings = tuple({word[k:] for word in self.words for k in range(1, len(word))})

    def mark(self, conversation: Conversation) -> Conversation:
        """Replace every control token in the messages by its marker."""
        return tuple(replace(message, content=self._mark(message.content)) for message in conversation)

    def encode(self, text: str, encode: Callable[[str], Ids]) -> Ids:
        """Encode marked text: markers as the letters of their words, what is between them with `encode`."""
        if CUT in text:
            text = self._without_needless_cuts(text)
        if MARK not in text:
            return encode(text)
        first, *others = text.split(MARK)
        ids = [*encode(first)]
        for piece in others:
            ids += [*self._letters[ord(piece[0]) - FIRST], *encode(piece[1:])]
        return tuple(ids)

    def _mark(self, content: str) -> str:
        marked = self._pattern.sub(lambda match: self._markers[match[0]], content)
        inside = any(content in word for word in self.words) if content else False
        before = CUT if inside or content.startswith(self._endings) else ""
        after = CUT if inside or content.endswith(self._beginnings) else ""
        return before + marked + after

    def _without_needless_cuts(self, text: str) -> str:
        """Keep a cut only where a word would come about without it."""
        pieces = text.split(CUT)
        longest = len(self.words[0])
        kept = pieces[0]
        for index, piece in enumerate(pieces[1:], start=1):
            left, right = kept.replace(CUT, "")[-longest:], "".join(pieces[index:])[:longest]
            kept += (CUT if self._spans(left, right) else "") + piece
        return kept

    def _spans(self, left: str, right: str) -> bool:
        """Whether a word lies across the border of two texts."""
        return any(
            left.endswith(word[:k]) and right.startswith(word[k:]) for word in self.words for k in range(1, len(word))
        )

    @cached_property
    def _letters(self) -> list[Ids]:
        """The ids of each word as text, by marker. Of a copy: threads that encode meanwhile would see the switch."""
        plain = copy.deepcopy(self.tokenizer)
        plain.split_special_tokens = True
        return [
            (),
            *(
                tuple(plain(word, add_special_tokens=False, split_special_tokens=True)["input_ids"])
                for word in self.words
            ),
        ]
