"""What several gates look at: words, prose without code and formulas, blocks of code, the pool of a text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ultrafuser.data.overlap import normalised_words
from ultrafuser.synthesis.gates.settings import Scope
from ultrafuser.synthesis.node import Item
from ultrafuser.synthesis.recipe import INSTRUCTION_STAGES

# Instructions are compared with each other whatever stage made them.
_POOL = (*INSTRUCTION_STAGES, "complicated", "evolved")
_FENCE = re.compile(r"^[ \t]{0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^\n]*$", re.MULTILINE)
_NOT_PROSE = re.compile(
    r"`[^`\n]{1,500}`|\$\$.{1,4000}?\$\$|\$[^$\n]{1,500}\$|\\\(.{1,2000}?\\\)|\\\[.{1,4000}?\\\]|\\[A-Za-z]+"
    r"|https?://\S{1,500}|</?[A-Za-z][^<>]{0,200}>",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of code; `is_open` where the text ends before the block does."""

    language: str
    code: str
    is_open: bool


def scope_of(item: Item, scope: Scope, purpose: str) -> str:
    """The name under which items are compared with each other."""
    pool = "pool" if item.stage in _POOL else item.stage
    return f"{purpose}:{item.domain}:{pool}:{item.parent or '' if scope == 'topic' else ''}"


def hash_of(text: str) -> int:
    """63 bits of blake2b: fits a signed integer of any database."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1


def normalised(text: str) -> str:
    """A text by its words; one without any, by its characters."""
    return " ".join(normalised_words(text)) or "".join(text.split())


@lru_cache(maxsize=2048)
def shingles(text: str, words: int) -> frozenset[str]:
    """The word sequences of this length; of a shorter text, the whole."""
    found = normalised_words(text)
    if len(found) <= words:
        return frozenset((normalised(text),))
    return frozenset(" ".join(found[start : start + words]) for start in range(len(found) - words + 1))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """What two sets share, as part of what they hold together."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a text, in order."""
    position = 0
    while opening := _FENCE.search(text, position):
        fence, language = opening[1], opening[2].strip("{}.").casefold()
        # A block ends with a bare fence of its own kind, as long or longer: a shorter one belongs to the code.
        closing = re.compile(rf"^[ \t]*{re.escape(fence)}{fence[0]}*[ \t]*$", re.MULTILINE).search(text, opening.end())
        end = closing.start() if closing else len(text)
        yield Block(language, text[opening.end() : end].strip("\n"), closing is None)
        if closing is None:
            return
        position = closing.end()


def prose(text: str) -> str:
    """A text without blocks of code, formulas, tags and addresses."""
    kept: list[str] = []
    position = 0
    while opening := _FENCE.search(text, position):
        kept.append(text[position : opening.start()])
        closing = re.compile(rf"^[ \t]*{re.escape(opening[1])}", re.MULTILINE).search(text, opening.end())
        position = closing.end() if closing else len(text)
    kept.append(text[position:])
    return _NOT_PROSE.sub(" ", " ".join(kept))
