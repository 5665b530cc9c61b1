"""Gates that look at a text alone: length, refusals and self-talk, texts that stop before their end."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from ultrafuser.data.overlap import normalised_words
from ultrafuser.synthesis.gates.base import GateContext
from ultrafuser.synthesis.gates.settings import LengthSettings, RefusalsSettings, TruncatedSettings
from ultrafuser.synthesis.gates.texts import blocks
from ultrafuser.synthesis.node import Item
from ultrafuser.synthesis.recipe import GateName

_SHORT_CHARACTERS = 400  # a refusal stands at the beginning
_LAST_CHARACTERS = 400  # that are looked at for an end
_LAST_WORDS = 5  # fewer in a last line may be a verse, a name, a heading
_CANNOT = r"(?:can(?:no|['’]?)t|am (?:unable|not able|not allowed) to|won['’]?t|will not|must decline to)"
_SERVE = (
    r"(?:\w+ ){0,2}?(?:assist|help (?:you|with)|comply|fulfil+|provide|create|generate|write|answer|respond|do that|"
    r"discuss|support|participate|engage|construct|implement)\b"
)
_REFUSALS = [
    re.compile(
        r"^\W*(?:(?:I['’]m|I am)(?: very| so| truly)? sorry|(?:my )?apolog\w+|sorry|unfortunately|regrettably)\b"
        rf"[^\n]{{0,60}}?\bI (?:{_CANNOT} {_SERVE}|do(?:n['’]t| not) (?:feel comfortable|have (?:the ability|access)))",
        re.IGNORECASE,
    ),
    re.compile(rf"^\W*I {_CANNOT} {_SERVE}", re.IGNORECASE),
    re.compile(r"^\W*I must (?:respectfully |politely )?decline\b", re.IGNORECASE),
    re.compile(r"\b(?:violates?|against) (?:my|our|OpenAI['’]s) (?:content |usage )?(?:policy|policies|guidelines)\b"),
]
_MODEL = r"(?:AI|artificial intelligence|(?:large )?language model)"
_SELF_TALK = [
    re.compile(
        rf"\bas an? (?:helpful )?{_MODEL}(?: language)?(?: (?:model|assistant|chatbot))?(?=\s*[,.;)]|\s+(?:I|my)\b)",
        re.IGNORECASE,
    ),
    re.compile(rf"\bI(?:['’]m| am) (?:just |only )?an? {_MODEL}\b"),
    re.compile(r"\bmy (?:training data|knowledge cut-?off|programming does not|developers at)\b", re.IGNORECASE),
    re.compile(r"\bI (?:was|am|have been) (?:trained|developed|created|made) by (?:OpenAI|Anthropic|Google|Meta)\b"),
    re.compile(r"^\W*I(?:['’]m| am) (?:ChatGPT|Claude|Qwen|Gemini|Llama|Bard)\b"),
]
# What the writer of instructions says to those who asked for them.
_WRITER_TALK = [
    re.compile(
        r"^\W*here (?:are|is) (?:the |some |your |an? |\w+ )?(?:new |rewritten )?(?:instruction|topic|prompt)",
        re.IGNORECASE,
    ),
    re.compile(r"\[(?:insert|your|name of|fill in|placeholder|attach)\b[^\]\n]{0,60}\]", re.IGNORECASE),
    re.compile(r"\bthe (?:given|above|original|rewritten|created) (?:instruction|prompt)\b", re.IGNORECASE),
]
# A last line that ends without a full stop may be a verse, a list, a formula, a line of code, or hashtags; one that
# ends with a word like these, or goes on after a sentence, was cut.
_NEEDS_MORE = re.compile(
    r"(?:[,(\[{–—]|\b(?:and|or|but|the|an?|of|to|with|in|on|at|for|from|by|as|that|which|who|whose|because|if|when|while|"
    r"is|are|was|were|be|has|have|had|will|would|can|could|should|may|its|their|your|such|than|into|between))$"
)
_GOES_ON = re.compile(r"[a-z]{2}[.!?][\"'”’)]? [A-Z][^.!?#|={}<>]{20,}[a-z]$")
_NO_SENTENCE = re.compile(r"^(?:\s*[|>#$\\]| {4}|\t)|[;{}=<>|]|https?://\S+$|#\w+$")


@dataclass(frozen=True)
class LengthGate:
    """Drops texts of too few or too many words or characters."""

    settings: LengthSettings
    name: GateName = "length"

    def judge(self, item: Item, context: GateContext) -> str | None:
        """Too short or too long."""
        del context
        settings, num_characters = self.settings, len(item.text.strip())
        if num_characters < settings.min_characters:
            return "too few characters"
        if settings.max_characters is not None and num_characters > settings.max_characters:
            return "too many characters"
        num_words = len(normalised_words(item.text))
        if num_words < settings.min_words:
            return "too few words"
        if settings.max_words is not None and num_words > settings.max_words:
            return "too many words"
        return None

    def kept(self, item: Item, context: GateContext) -> None:
        """Nothing to remember."""


@dataclass(frozen=True)
class RefusalsGate:
    """Drops refusals, "as an AI", and instructions that talk about instructions. Patterns are of English."""

    settings: RefusalsSettings
    name: GateName = "refusals"

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        return [re.compile(pattern) for pattern in self.settings.patterns]

    def judge(self, item: Item, context: GateContext) -> str | None:
        """A refusal, or a writer that speaks of itself or of its task."""
        del context
        text = item.text.strip()
        if any(pattern.search(text[:_SHORT_CHARACTERS]) for pattern in _REFUSALS):
            return "refusal"
        if any(pattern.search(text) for pattern in _SELF_TALK):
            return "speaks of itself as a model"
        is_answer = item.stage in ("responses", "follow_up_responses")
        if not is_answer and any(pattern.search(text) for pattern in _WRITER_TALK):
            return "speaks of its task or leaves a blank"
        if any(pattern.search(text) for pattern in self._patterns):
            return "pattern of the recipe"
        return None

    def kept(self, item: Item, context: GateContext) -> None:
        """Nothing to remember."""


@dataclass(frozen=True)
class TruncatedGate:
    """Drops texts that are empty or stop before their end."""

    settings: TruncatedSettings
    name: GateName = "truncated"

    def judge(self, item: Item, context: GateContext) -> str | None:
        """Empty, out of tokens, in the midst of a block of code or of a sentence."""
        text = item.text.rstrip()
        if not any(character.isalnum() for character in text):
            return "empty"
        if context.finish_reason(item) == "length":
            return "out of tokens"
        if any(block.is_open for block in blocks(text)):
            return "code block without an end"
        if self.settings.sentences and not text.endswith(("```", "~~~")) and _stops_in_a_sentence(text):
            return "ends within a sentence"
        return None

    def kept(self, item: Item, context: GateContext) -> None:
        """Nothing to remember."""


def _stops_in_a_sentence(text: str) -> bool:
    line = text.rpartition("\n")[2].rstrip("*_ ")[-_LAST_CHARACTERS:]
    if len(line.split()) < _LAST_WORDS or _NO_SENTENCE.search(line):
        return False
    return _NEEDS_MORE.search(line) is not None or _GOES_ON.search(line) is not None
