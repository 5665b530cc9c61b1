"""What each gate of each stage asks for; `domains/shared/defaults.yaml` holds the values that domains start from."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from ultrafuser.config.section import Fraction, Section

Scope = Literal["domain", "topic"]


class LengthSettings(Section):
    """Bounds of a text; a character of Chinese, Japanese or Korean counts as a word."""

    min_words: NonNegativeInt = 0
    max_words: PositiveInt | None = None
    min_characters: NonNegativeInt = 0
    max_characters: PositiveInt | None = None


class DuplicatesSettings(Section):
    """Texts that are the same but for case, spaces and punctuation."""

    scope: Scope = "domain"  # topic: only what was made from the same item is compared


class NearDuplicatesSettings(Section):
    """Texts that share most of their word sequences."""

    scope: Scope = "domain"
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.7  # Jaccard similarity of the sets of word sequences
    words: PositiveInt = 3  # of a sequence
    permutations: Annotated[int, Field(ge=16, le=1024)] = 128


class RefusalsSettings(Section):
    """Refusals, and text in which the writer speaks of itself."""

    patterns: tuple[str, ...] = ()  # further regular expressions, for other languages say

    @field_validator("patterns")
    @classmethod
    def _compile(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return patterns


class TruncatedSettings(Section):
    """Texts that stop before their end."""

    sentences: bool = True  # also drop what ends neither as a sentence, nor as a list, formula or block of code


class LanguageSettings(Section):
    """Texts that are surely in another language than the domain's."""

    certainty: Fraction = 0.8  # of py3langid, above which it is believed
    min_letters: PositiveInt = 40  # of prose, below which it is not asked


class CodeSettings(Section):
    """Code blocks in Python and JSON that do not parse; of other languages nothing is said."""


class EvolutionSettings(Section):
    """Rewritten instructions that are not what was asked for (WizardLM's elimination)."""

    max_similarity: Fraction = 0.9  # to the original
    min_growth: NonNegativeFloat = 0.8  # words, as a multiple of the original's
    max_growth: PositiveFloat = 8.0
    max_added_words: PositiveInt = 250  # allowed whatever `max_growth` says of a short original


class AgreementSettings(Section):
    """Sampled answers of which no other one comes to the same conclusion. Wants `responses.samples` of 2 or more."""


class OverlapSettings(Section):
    """Texts that share 13 words in a row with a test set; only with `benchmarks` in the recipe."""

    benchmarks: tuple[str, ...] | None = None  # None: all that we know, and each must be in the folder
    answers: bool = False  # compare with reference answers, too


class StageGates(Section):
    """The gates of one stage; None: this gate does not stand there."""

    length: LengthSettings | None = None
    truncated: TruncatedSettings | None = None
    refusals: RefusalsSettings | None = None
    language: LanguageSettings | None = None
    code: CodeSettings | None = None
    evolution: EvolutionSettings | None = None
    duplicates: DuplicatesSettings | None = None
    near_duplicates: NearDuplicatesSettings | None = None
    overlap: OverlapSettings | None = None
    agreement: AgreementSettings | None = None
