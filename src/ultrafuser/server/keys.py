"""API keys: read from a file or the environment, held and compared as hashes, in constant time."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from ultrafuser.errors import ConfigError

VARIABLE = "ULTRAFUSER_API_KEYS"
_KEY = re.compile(r"[!-~]{8,512}")


class KeyRing:
    """Who may use the server. Without keys, everybody who reaches it.

    Args:
        keys: As clients send them.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [_digest(key) for key in dict.fromkeys(keys)]

    @classmethod
    def read(cls, file: Path | None) -> Self:
        """Keys of a file, one a line, `#` begins a comment; without one those of the environment, if any.

        Raises:
            ConfigError: The file cannot be read, holds no key, or holds something that is none.
        """
        if file is None:
            return cls(_check(os.environ.get(VARIABLE, "").split(), f"the variable {VARIABLE}"))
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"the key file {file} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"the key file {file} is not text (UTF-8)") from error
        keys = _check([line.partition("#")[0].strip() for line in lines], f"the key file {file}")
        if not keys:
            raise ConfigError(f"the key file {file} holds no key: write one a line, or leave --api-keys out")
        return cls(keys)

    def __len__(self) -> int:
        return len(self._digests)

    def find(self, headers: Sequence[bytes]) -> str | None:
        """What the log calls the key in a request's Authorization headers; None where there is no good one.

        Args:
            headers: The values of all Authorization headers of a request; more than one is never good.
        """
        if not self._digests:
            return "-"
        given = _digest(_key_of(headers[0]) if len(headers) == 1 else b"")
        # All are compared, whichever fits, so time tells nothing.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return hashlib.sha256(b"log" + given).hexdigest()[:8] if any(matches) else None


def _key_of(header: bytes) -> bytes:
    """`Bearer KEY`, or the password of HTTP Basic, which lets a browser ask for the key."""
    scheme, _, value = header.partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""


def _check(keys: Iterable[str], source: str) -> list[str]:
    found = [key for key in keys if key]
    for number, key in enumerate(found, start=1):
        if not _KEY.fullmatch(key):
            # The key itself is not shown: this may end up in a log.
            raise ConfigError(f"{source}: key {number} must have 8 to 512 printable ASCII characters and no space")
    return found


def _digest(key: str | bytes) -> bytes:
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()
