"""Overlap: which training records share word sequences with test items, and a way to leave those out.

Texts become words (NFKC, case-folded, punctuation dropped). A record overlaps an item when one of its messages
holds 13 words in a row of the item, or the whole of an item of 5 to 12 words; a shorter item says too little to
be compared, and is counted as such. One match is enough to drop a record.

Source: Brown et al. 2020 (arXiv 2005.14165), Appendix C, the 13-gram filter that Ding et al. 2024
(arXiv 2403.08281) apply to their training data.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ultrafuser.data.benchmarks import BenchmarkItem
from ultrafuser.data.records import Record

NGRAM_WORDS = 13
MIN_WORDS = 5

# Chinese, Japanese kana and Korean are written without spaces: each character is a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")

ItemKey = tuple[str, str]  # benchmark, item id


def normalised_words(text: str) -> list[str]:
    """The words of a text, without case, punctuation or spelling variants of one character."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


@dataclass(frozen=True, slots=True)
class Overlap:
    """One record holds a word sequence of one test item.

    Attributes:
        source: Where the record stands.
        message: Which of its messages, from 0.
        span: The longest shared run of words, normalised.
        num_words: Words of the span.
    """

    benchmark: str
    item_id: str
    record_id: str
    source: str
    message: int
    span: str
    num_words: int


@dataclass(frozen=True, slots=True)
class BenchmarkCount:
    """How one benchmark fared; `num_too_short` items have no text of at least 5 words and were not compared."""

    num_items: int
    num_items_hit: int
    num_too_short: int
    num_records_hit: int


@dataclass(frozen=True, slots=True)
class OverlapReport:
    """Every overlap found, in the order of the records, and what was compared."""

    overlaps: tuple[Overlap, ...]
    num_records: int
    num_items: dict[str, int]
    num_too_short: dict[str, int]

    @property
    def record_ids(self) -> frozenset[str]:
        """The ids of the records to drop."""
        return frozenset(overlap.record_id for overlap in self.overlaps)

    def per_benchmark(self) -> dict[str, BenchmarkCount]:
        """Counts of every benchmark compared, those without a hit included."""
        items: dict[str, set[str]] = defaultdict(set)
        records: dict[str, set[str]] = defaultdict(set)
        for overlap in self.overlaps:
            items[overlap.benchmark].add(overlap.item_id)
            records[overlap.benchmark].add(overlap.record_id)
        return {
            name: BenchmarkCount(num, len(items[name]), self.num_too_short.get(name, 0), len(records[name]))
            for name, num in self.num_items.items()
        }


class OverlapIndex:
    """The word sequences of test items, ready to be looked up.

    A sequence is kept as text, not as a hash, so no collision can drop a record. Its first 5 words lead to the
    lengths that begin so: one cheap look-up a position tells that almost every position matches nothing.
    """

    def __init__(self, benchmarks: Iterable[BenchmarkItem]) -> None:
        self.items_of: dict[str, list[ItemKey]] = defaultdict(list)
        self.lengths_after: dict[str, set[int]] = defaultdict(set)
        compared: dict[ItemKey, bool] = {}
        for benchmark, item_id, text in benchmarks:
            words = normalised_words(text)
            key = (benchmark, item_id)
            compared[key] = compared.get(key, False) or len(words) >= MIN_WORDS
            self._add(key, words)
        self.num_items = Counter(benchmark for benchmark, _ in compared)
        self.num_too_short = Counter(benchmark for (benchmark, _), long in compared.items() if not long)

    def _add(self, key: ItemKey, words: list[str]) -> None:
        length = min(len(words), NGRAM_WORDS)
        if length < MIN_WORDS:
            return
        for start in range(len(words) - length + 1):
            items = self.items_of[" ".join(words[start : start + length])]
            if key not in items:
                items.append(key)
            self.lengths_after[" ".join(words[start : start + MIN_WORDS])].add(length)

    def longest_spans(self, words: list[str]) -> dict[ItemKey, tuple[int, int]]:
        """Look a text up: for each item found, where its longest shared run of words starts and ends.

        Matches that overlap or touch make one run, so a run is never shorter than what matched.
        """
        longest: dict[ItemKey, tuple[int, int]] = {}
        open_runs: dict[ItemKey, tuple[int, int]] = {}
        for start, end, key in self._matches(words):
            run = open_runs.get(key)
            grown = (run[0], max(end, run[1])) if run and start <= run[1] else (start, end)
            open_runs[key] = grown
            best = longest.get(key, (0, 0))
            if grown[1] - grown[0] > best[1] - best[0]:
                longest[key] = grown
        return longest

    def _matches(self, words: list[str]) -> Iterator[tuple[int, int, ItemKey]]:
        lengths_after = self.lengths_after.get
        for start in range(len(words) - MIN_WORDS + 1):
            for length in lengths_after(" ".join(words[start : start + MIN_WORDS])) or ():
                end = start + length
                for key in self.items_of.get(" ".join(words[start:end]), ()) if end <= len(words) else ():
                    yield start, end, key


def find_overlaps(records: Iterable[Record], benchmarks: Iterable[BenchmarkItem] | OverlapIndex) -> OverlapReport:
    """Compare every message of every record with every test item.

    Args:
        records: Read once, in order; may be a stream.
        benchmarks: Test items, or an index made of them, to be used again.
    """
    index = benchmarks if isinstance(benchmarks, OverlapIndex) else OverlapIndex(benchmarks)
    overlaps: list[Overlap] = []
    num_records = 0
    for record in records:
        num_records += 1
        overlaps.extend(_overlaps_of(record, index))
    return OverlapReport(tuple(overlaps), num_records, dict(index.num_items), dict(index.num_too_short))


def _overlaps_of(record: Record, index: OverlapIndex) -> Iterator[Overlap]:
    for position, message in enumerate(record.messages):
        words = normalised_words(message.content)
        for (benchmark, item_id), (start, end) in index.longest_spans(words).items():
            span = " ".join(words[start:end])
            yield Overlap(benchmark, item_id, record.id, record.source, position, span, end - start)


def drop_overlaps(records: Iterable[Record], report: OverlapReport) -> list[Record]:
    """The records without an overlap in the report, in their order; equal records go together."""
    overlapping = report.record_ids
    return [record for record in records if record.id not in overlapping]
