"""Single tokens as bytes and as text: log-probabilities name tokens that may be no whole characters.

Decoding one token at a time would drop the spaces of some tokenizers and show pieces of characters as question marks.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # what SentencePiece writes for a space


class TokenText:
    """Bytes and text of each token of a tokenizer.

    Args:
        tokenizer: Of transformers; byte-level or SentencePiece-like.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.added = {int(index): str(token.content) for index, token in tokenizer.added_tokens_decoder.items()}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.is_byte_level = "ByteLevel" in repr(getattr(backend, "decoder", None))
        self.raw = lru_cache(maxsize=2**17)(self._raw)

    def text(self, token_id: int) -> str:
        """The token as text; where it is no whole characters, its bytes as OpenAI writes them: `bytes:\\xe2\\x82`."""
        raw = self.raw(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _raw(self, token_id: int) -> bytes:
        if (added := self.added.get(token_id)) is not None:
            return added.encode("utf-8")
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # rows of the output layer that no token has
            return b""
        if self.is_byte_level:
            bytes_of = _bytes_of_characters()
            return bytes(bytes_of[character] for character in token if character in bytes_of)
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return str(token).replace(_SPACE, " ").encode("utf-8")


@lru_cache(maxsize=1)
def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
