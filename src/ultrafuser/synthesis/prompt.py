"""A prompt is a Markdown file with {{placeholders}}; what fills them is inserted as it stands, never expanded again.

Instructions and topics are written by models and people, and may hold braces of their own: one pass over the file's
text replaces its placeholders, so nothing that was inserted can become one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ultrafuser.errors import ConfigError

MAX_BYTES = 200_000  # of a prompt file: a longer one is some other file
_PLACEHOLDER = re.compile(r"\{\{\s*([A-Za-z_][A-Za-z0-9_]*)\s*\}\}")


@dataclass(frozen=True, slots=True)
class Prompt:
    """Text with placeholders, and the file it comes from."""

    path: Path
    text: str

    @property
    def placeholders(self) -> frozenset[str]:
        """The names between double braces."""
        return frozenset(_PLACEHOLDER.findall(self.text))

    def render(self, **values: str) -> str:
        """The text with its placeholders filled in; values that it has no place for are left out.

        Raises:
            ConfigError: A placeholder has no value.
        """
        if missing := sorted(self.placeholders - values.keys()):
            raise ConfigError(f"{self.path}: nothing fills {{{{{missing[0]}}}}}: take it out of the file")
        return _PLACEHOLDER.sub(lambda match: values[match[1]], self.text)


def load_prompt(path: Path, *, needs: Iterable[str] = (), knows: Iterable[str] = ()) -> Prompt:
    """Read a prompt file.

    Args:
        needs: Placeholders without which the request would make no sense.
        knows: Further ones that are filled where they stand.

    Raises:
        ConfigError: The file cannot be read, is empty, lacks a placeholder or has one that nobody fills.
    """
    prompt = Prompt(path, _read(path))
    needed, known = set(needs), set(knows)
    if missing := sorted(needed - prompt.placeholders):
        names = ", ".join(f"{{{{{name}}}}}" for name in missing)
        raise ConfigError(f"{path} lacks the placeholder {names}: write it where its value is to stand")
    if unknown := sorted(prompt.placeholders - needed - known):
        names = ", ".join(f"{{{{{name}}}}}" for name in sorted(needed | known))
        raise ConfigError(
            f"{path} has the placeholder {{{{{unknown[0]}}}}}, which nothing fills: take it out, or use one of {names}"
        )
    return prompt


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_BYTES} bytes: a prompt file holds one prompt")
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise ConfigError(f"there is no prompt file {path}: write it") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no UTF-8 text: save it as such") from None
    if not text:
        raise ConfigError(f"{path} is empty: write the prompt")
    return text
