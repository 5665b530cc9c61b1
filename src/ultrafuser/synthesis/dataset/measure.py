"""Numbers of a data set: lengths, turns, topics, in tokens of a tokenizer or in words.

Lengths are counted into histograms, so quantiles are exact and memory does not grow with the number of records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ultrafuser.errors import ModelError
from ultrafuser.synthesis.dataset.records import SynthesisRecord

CountLengths = Callable[[Sequence[str]], Sequence[int]]
BATCH_RECORDS = 500


class Lengths(BaseModel):
    """A distribution of lengths; `histogram` holds (length, number) in order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    median: int
    low: int  # 5%
    high: int  # 95%
    longest: int
    histogram: tuple[tuple[int, int], ...]


class DomainNumbers(BaseModel):
    """A domain in numbers.

    Attributes:
        turns: Mean number of questions of a conversation.
        conversation: All messages together.
        instruction: The first question.
        response: Each answer.
        relations: Records by how their instruction came to be.
        meta_topics: Records by meta-topic, most first.
        sub_topics: Number of sub-topics that have records; their least, median and most records.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    domain: str
    records: int
    turns: float
    conversation: Lengths
    instruction: Lengths
    response: Lengths
    relations: dict[str, int]
    meta_topics: dict[str, int]
    sub_topics: int
    records_per_sub_topic: tuple[int, int, int]


def count_words(texts: Sequence[str]) -> list[int]:
    """Words as white space parts them."""
    return [len(text.split()) for text in texts]


def token_counter(place: str | Path) -> CountLengths:
    """Counts tokens of a tokenizer, without special ones.

    Args:
        place: A folder or a hub id.

    Raises:
        ModelError: No tokenizer can be loaded from there.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(place))
    except (OSError, ValueError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"no tokenizer could be loaded from {place}: {line}") from error

    def count(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []

    return count


def measure_domain(domain: str, records: Iterator[SynthesisRecord], count: CountLengths) -> DomainNumbers | None:
    """The numbers of a domain; None where it has no record.

    Args:
        domain: Its name.
        records: Read once.
        count: The length of each text.
    """
    conversation, instruction, response = Counter[int](), Counter[int](), Counter[int]()
    relations, meta_topics, sub_topics = Counter[str](), Counter[str](), Counter[str]()
    num_records = num_questions = 0
    while batch := list(islice(records, BATCH_RECORDS)):
        lengths = iter(count([message.content for record in batch for message in record.messages]))
        for record in batch:
            turns = [next(lengths) for _ in record.messages]
            conversation[sum(turns)] += 1
            instruction[turns[0]] += 1
            response.update(turns[1::2])
            num_questions += len(turns[::2])
            relations[record.relation] += 1
            meta_topics[record.meta_topic or "(none)"] += 1
            if record.sub_topic is not None:
                sub_topics[record.sub_topic] += 1
        num_records += len(batch)
    if not num_records:
        return None
    sizes = Counter(sub_topics.values())
    return DomainNumbers(
        domain=domain,
        records=num_records,
        turns=num_questions / num_records,
        conversation=_lengths(conversation),
        instruction=_lengths(instruction),
        response=_lengths(response),
        relations=dict(relations.most_common()),
        meta_topics=dict(meta_topics.most_common()),
        sub_topics=len(sub_topics),
        records_per_sub_topic=(min(sizes), _quantile(sizes, 0.5), max(sizes)) if sizes else (0, 0, 0),
    )


def _lengths(histogram: Counter[int]) -> Lengths:
    return Lengths(
        mean=sum(length * number for length, number in histogram.items()) / histogram.total(),
        median=_quantile(histogram, 0.5),
        low=_quantile(histogram, 0.05),
        high=_quantile(histogram, 0.95),
        longest=max(histogram),
        histogram=tuple(sorted(histogram.items())),
    )


def _quantile(histogram: Counter[int], share: float) -> int:
    """The least length that this share of all does not exceed."""
    wanted, seen = share * histogram.total(), 0
    for length, number in sorted(histogram.items()):
        seen += number
        if seen >= wanted:
            return length
    raise AssertionError("an empty histogram has no quantile")
