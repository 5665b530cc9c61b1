"""The gate of languages: what is surely not in the domain's language is dropped.

Code, formulas and short texts say little about a language, so the former are left out and the latter pass. Where the
instruction speaks of another language, it and its answer may be in one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from ultrafuser.errors import ConfigError
from ultrafuser.synthesis.gates.base import GateContext
from ultrafuser.synthesis.gates.settings import LanguageSettings
from ultrafuser.synthesis.gates.texts import prose
from ultrafuser.synthesis.node import Item
from ultrafuser.synthesis.recipe import GateName

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

MAX_CHARACTERS = 2000  # of prose: more makes it no surer
_NO_LANGUAGE = ("la", "zxx")  # names of species, lorem ipsum, symbols
# Written alike, so taken for each other.
_ALIKE = [{"en", "pcm", "sco"}, {"no", "nb", "nn", "da"}, {"zh", "yue", "wuu"}, {"hr", "sr", "bs", "sl"}, {"id", "ms"}]
_ASKS_FOR_ANOTHER = re.compile(
    r"\btranslat|\blanguages?\b|\b(?:in|into|to|from|of|an?|the) (?:Arabic|Bengali|Chinese|Czech|Danish|Dutch|English|"
    r"Finnish|French|German|Greek|Hebrew|Hindi|Hungarian|Indonesian|Italian|Japanese|Korean|Latin|Mandarin|Norwegian|"
    r"Persian|Polish|Portuguese|Romanian|Russian|Spanish|Swahili|Swedish|Thai|Turkish|Ukrainian|Urdu|Vietnamese)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class LanguageGate:
    """Drops what py3langid is sure is in another language.

    Raises:
        ConfigError: py3langid is not installed, or does not know the language (when made).
    """

    language: str
    settings: LanguageSettings
    name: GateName = "language"

    def __post_init__(self) -> None:
        if self.language not in (labels := _identifier().labels):
            raise ConfigError(
                f"language {self.language!r} is not one that py3langid knows ({', '.join(sorted(labels)[:8])}, ...): "
                "give an ISO 639-1 code, or switch the gate off with `language: null`"
            )

    def judge(self, item: Item, context: GateContext) -> str | None:
        """Surely in another language, which is named."""
        text = prose(item.text)[:MAX_CHARACTERS]
        # A character of a script without spaces says about as much as three letters.
        letters = sum(3 if character >= "\u2e80" else 1 for character in text if character.isalpha())
        if letters < self.settings.min_letters:
            return None
        found, certainty = _identifier().classify(text)
        if found == self.language or certainty < self.settings.certainty:
            return None
        if found in _NO_LANGUAGE or any({found, self.language} <= alike for alike in _ALIKE):
            return None
        parent = context.parent(item)
        if _ASKS_FOR_ANOTHER.search(item.text if parent is None else f"{parent.text}\n{item.text}"):
            return None
        return f"language {found}"

    def kept(self, item: Item, context: GateContext) -> None:
        """Nothing to remember."""


@cache
def _identifier() -> LanguageIdentifier:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ConfigError("the language gate needs py3langid: pip install 'ultrafuser[synthesis]'") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
