"""The gate of test sets: what shares 13 words in a row with a test question is not to be learnt from.

Source: Brown et al. 2020 (arXiv 2005.14165), Appendix C, as Ding et al. 2024 (arXiv 2403.08281) apply it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ultrafuser.data.benchmarks import load_benchmarks
from ultrafuser.data.overlap import OverlapIndex, normalised_words
from ultrafuser.synthesis.gates.base import GateContext
from ultrafuser.synthesis.node import Item
from ultrafuser.synthesis.recipe import GateName


@dataclass(frozen=True)
class OverlapGate:
    """Drops texts that overlap with an item of a test set."""

    index: OverlapIndex
    name: GateName = "overlap"

    def judge(self, item: Item, context: GateContext) -> str | None:
        """An overlap; the first test set in the alphabet is named."""
        del context
        found = self.index.look_up(normalised_words(item.text))
        return f"overlaps with {min(benchmark for benchmark, _ in found)}" if found else None

    def kept(self, item: Item, context: GateContext) -> None:
        """Nothing to remember."""


@lru_cache(maxsize=4)
def benchmark_index(folder: Path, names: tuple[str, ...] | None, *, answers: bool) -> OverlapIndex:
    """The test sets of a folder, read once for all stages and domains.

    Raises:
        ConfigError: No benchmark has this name.
        DataError: A file is missing or damaged.
    """
    return OverlapIndex(load_benchmarks(folder, names, answers=answers))
