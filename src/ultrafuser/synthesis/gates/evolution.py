"""The gate of evolutions: a rewritten instruction has to be another one, and not a longer or broken copy.

Source: Xu et al. 2023 (WizardLM, arXiv 2304.12244), Section 3.1, "Elimination Evolving", without asking a model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ultrafuser.data.overlap import normalised_words
from ultrafuser.synthesis.gates.base import GateContext
from ultrafuser.synthesis.gates.settings import EvolutionSettings
from ultrafuser.synthesis.gates.texts import jaccard, normalised, shingles
from ultrafuser.synthesis.node import Item
from ultrafuser.synthesis.recipe import GateName

_LEAK = re.compile(
    r"#\s?(?:the )?(?:given|created|rewritten|new) prompt\s?#|</?(?:instruction|task|problem)>|"
    r"\b(?:given|rewritten|evolved|created|new|more complex) (?:prompt|instruction)\b|"
    r"\badded (?:constraint|requirement)s?:",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class EvolutionGate:
    """Drops rewritten instructions that are no others, are cut down or swollen, or show the request they answer."""

    settings: EvolutionSettings
    name: GateName = "evolution"

    def judge(self, item: Item, context: GateContext) -> str | None:
        """No new instruction."""
        original = context.parent(item)
        if original is None:
            return "without its original"
        if _LEAK.search(item.text) and not _LEAK.search(original.text):
            return "speaks of the request"
        if normalised(item.text) == normalised(original.text):
            return "same as the original"
        if jaccard(shingles(item.text, 3), shingles(original.text, 3)) > self.settings.max_similarity:
            return "like the original"
        if item.detail.get("method") == "breadth":
            return None
        before, after = len(normalised_words(original.text)), len(normalised_words(item.text))
        if after < self.settings.min_growth * before:
            return "shorter than the original"
        if after > max(self.settings.max_growth * before, before + self.settings.max_added_words):
            return "much longer than the original"
        return None

    def kept(self, item: Item, context: GateContext) -> None:
        """Nothing to remember."""
