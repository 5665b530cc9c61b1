"""Speculation: who drafts, how far, and what a draft has to earn.

A draft is a guess at the next tokens. All specialists read it in one pass and the fused model chooses its own token at
every position, as it would have without; the guess is kept as far as it agrees. So a draft changes speed, nothing else.

Who drafts: the specialist with the largest weight at the last token (`self`), which runs ahead alone, in fewer bits
where there is such a copy of it, and is then joined by the others; the text itself (`lookup`): what followed when the
same tokens stood there before; or a small `model`.

How far is decided before every block from what was measured: how often guesses of that kind agreed lately for this
choice, and what passes of that many rows cost. A guess that does not pay is not made, and is tried again now and then.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ultrafuser.engine.requests import Ids

DraftKind = Literal["self", "lookup", "model"]
LENGTHS = (2, 3, 4, 6, 8)
_KEEP = 0.9  # of an average at every observation: some ten blocks back
_KEEP_TYPICAL = 0.98  # the same for what is typical of all choices
_FIRST_RETRY, _LAST_RETRY = 16, 256  # tokens until a kind that did not pay is tried again
_GAIN = 1.05  # what a draft must promise before it is made
_ROW = 0.1  # of a pass of one row: what a further row costs as long as nothing is known
_REDUCED = 0.4  # of a specialist's part of a pass: what it costs in fewer bits as long as nothing is known


class Plan(NamedTuple):
    """What to draft in the next block; `length` 0 is plain decoding."""

    kind: DraftKind | None
    length: int


PLAIN = Plan(None, 0)


class Lookup:
    """Finds where the last few tokens stood before.

    Args:
        text: What there is at first.
        sizes: Numbers of tokens that must agree, the largest first.
    """

    def __init__(self, text: Sequence[int], sizes: Sequence[int] = (4, 3, 2)) -> None:
        self.text = list(text)
        self.sizes = tuple(sizes)
        self._after: dict[Ids, int] = {}  # tokens -> where the text went on the last time
        self._indexed = 0
        self._index()

    def extend(self, tokens: Iterable[int]) -> None:
        """More text."""
        self.text.extend(tokens)
        self._index()

    def draft(self, length: int) -> list[int]:
        """What followed the last tokens when they stood there before, at most `length` tokens."""
        for size in self.sizes:
            if len(self.text) > size and (at := self._after.get(tuple(self.text[-size:]))):
                return self.text[at : at + length]
        return []

    def _index(self) -> None:
        # An end of the text is indexed when something follows it, so that it never finds itself.
        for stop in range(max(self._indexed, 1), len(self.text)):
            for size in self.sizes:
                if stop >= size:
                    self._after[tuple(self.text[stop - size : stop])] = stop
        self._indexed = len(self.text)


@dataclass(slots=True)
class _Record:
    """How guesses of one kind fared for one choice."""

    agreed: float = 3.0
    tried: float = 4.0  # so the first choice of all starts as one of which three in four agree
    retry_after: int = _FIRST_RETRY
    tokens_without: int = 0

    @property
    def rate(self) -> float:
        return min(self.agreed / self.tried, 0.99)

    def observe(self, agreed: int, tried: int, keep: float = _KEEP) -> None:
        self.agreed = self.agreed * keep + agreed
        self.tried = self.tried * keep + tried


class DraftHistory:
    """What is remembered of the drafts of one choice.

    Args:
        rates: Shares of guesses that agree, from which it starts.
    """

    def __init__(self, rates: Mapping[DraftKind, float] | None = None) -> None:
        self.records: dict[DraftKind, _Record] = defaultdict(_Record)
        for kind, rate in (rates or {}).items():
            self.records[kind] = _Record(agreed=4.0 * rate)

    def observe(self, plan: Plan, agreed: int, length: int) -> None:
        """A block was read: of `length` guesses the first `agreed` were right."""
        assert plan.kind is not None
        record = self.records[plan.kind]
        record.observe(agreed, min(agreed + 1, length))
        record.tokens_without = 0

    def pass_over(self, kinds: Iterable[DraftKind]) -> None:
        """A token was decoded without a guess of these kinds."""
        for kind in kinds:
            self.records[kind].tokens_without += 1


@dataclass(slots=True)
class Costs:
    """Running averages of what passes take, in seconds.

    The first pass of its kind and size does not count: kernels are made for it.
    """

    passes: dict[tuple[int, int], float] = field(default_factory=dict)  # by choices and rows of each
    joins: dict[tuple[int, int], float] = field(default_factory=dict)  # the same without the one that ran ahead
    feeds: dict[tuple[DraftKind, int], float] = field(default_factory=dict)  # a token drafted, by kind and choices
    _met: set[tuple[str, object]] = field(default_factory=set)

    def observe_pass(self, num_choices: int, rows: int, seconds: float) -> None:
        """All specialists read `rows` tokens of each choice."""
        self._observe("passes", (num_choices, rows), seconds)

    def observe_join(self, num_choices: int, rows: int, seconds: float) -> None:
        """All specialists but the one that ran ahead read `rows` tokens of each choice."""
        self._observe("joins", (num_choices, rows), seconds)

    def observe_feed(self, kind: DraftKind, num_choices: int, seconds: float) -> None:
        """A drafter read one token of each choice."""
        self._observe("feeds", (kind, num_choices), seconds)

    def of_pass(self, num_choices: int, rows: int) -> float | None:
        """What a pass takes: as measured, or as passes of fewer and of more rows let expect."""
        one = self.passes.get((num_choices, 1))
        return None if one is None else _expect(self.passes, num_choices, rows, one)

    def of_join(self, num_choices: int, rows: int, one: float, share: float) -> float:
        """The same without the one that ran ahead, whose part the others' `share` leaves out."""
        known = {(num_choices, 1): share * one, **self.joins}
        return _expect(known, num_choices, rows, share * one)

    def _observe(self, name: str, key: object, seconds: float) -> None:
        if (name, key) not in self._met:
            self._met.add((name, key))
            return
        averages: dict[object, float] = getattr(self, name)
        old = averages.get(key, seconds)
        # What held a pass up was something else, mostly: less is believed sooner than more.
        averages[key] = 0.5 * (old + seconds) if seconds < old else 0.8 * old + 0.2 * min(seconds, 2 * old)


class Planner:
    """Decides about drafts.

    Args:
        kinds: Those allowed, in order of preference where they promise the same.
        num_specialists: N.
        max_choices: With more choices in the batch nothing is drafted: their rows cost what a draft would save.
        is_read_again: A specialist that ran ahead joins the others, since it did so in fewer bits.
    """

    def __init__(
        self, kinds: Sequence[DraftKind], *, num_specialists: int, max_choices: int, is_read_again: bool = False
    ) -> None:
        self.kinds = tuple(kinds)
        self.num_specialists = num_specialists
        self.max_choices = max_choices
        self.is_read_again = is_read_again
        self.costs = Costs()
        self._typical: dict[DraftKind, _Record] = defaultdict(_Record)

    def make_history(self) -> DraftHistory:
        """For a new choice, which starts as what was typical of those before."""
        return DraftHistory({kind: record.rate for kind, record in self._typical.items()})

    def observe(self, history: DraftHistory, plan: Plan, agreed: int, length: int) -> None:
        """A block was read: of `length` guesses the first `agreed` were right."""
        assert plan.kind is not None
        history.observe(plan, agreed, length)
        self._typical[plan.kind].observe(agreed, min(agreed + 1, length), _KEEP_TYPICAL)

    def plan(self, num_choices: int, histories: Sequence[DraftHistory], possible: dict[DraftKind, int]) -> Plan:
        """The block that promises the most tokens per second.

        Args:
            num_choices: In the batch.
            histories: Of these choices.
            possible: Longest draft of each kind that can be made now; kinds that cannot are missing.
        """
        one = self.costs.of_pass(num_choices, 1)
        if not possible or num_choices > self.max_choices or one is None:
            return PLAIN
        best, best_speed = PLAIN, _GAIN / one
        for kind in self.kinds:
            records = [history.records[kind] for history in histories]
            rate = sum(record.rate for record in records) / len(records)
            for length in LENGTHS:
                if length > possible.get(kind, 0):
                    continue
                bonus = kind != "self" or self.is_read_again
                speed = _expected(rate, length, bonus=bonus) / self._seconds(kind, num_choices, length, one)
                if speed > best_speed:
                    best, best_speed = Plan(kind, length), speed
        if best.kind is None:
            return self._retry(histories, possible)
        for history in histories:
            history.records[best.kind].retry_after = _FIRST_RETRY
        return best

    def _retry(self, histories: Sequence[DraftHistory], possible: dict[DraftKind, int]) -> Plan:
        for kind in self.kinds:
            records = [history.records[kind] for history in histories]
            if possible.get(kind, 0) >= LENGTHS[0] and all(r.tokens_without >= r.retry_after for r in records):
                for record in records:
                    record.retry_after = min(2 * record.retry_after, _LAST_RETRY)
                return Plan(kind, LENGTHS[0])
        return PLAIN

    def _seconds(self, kind: DraftKind, num_choices: int, length: int, one: float) -> float:
        """What a block takes, its draft included."""
        whole = self.costs.of_pass(num_choices, length + 1)
        assert whole is not None, "a pass of one row was measured"
        if kind == "lookup":
            return whole
        part = one / self.num_specialists
        if kind == "self" and not self.is_read_again:  # the drafter has read the block already
            whole = self.costs.of_join(num_choices, length, one, (one - part) / one)
        guess = _REDUCED * part if kind == "self" and self.is_read_again else part
        return whole + length * self.costs.feeds.get((kind, num_choices), guess)


def _expected(rate: float, length: int, *, bonus: bool) -> float:
    """Tokens of a block whose guesses agree at this rate; `bonus`: one more follows the last guess."""
    return float(sum(rate**i for i in range(length + bonus)))


def _expect(known: Mapping[tuple[int, int], float], num_choices: int, rows: int, one: float) -> float:
    """A line between the nearest measured numbers of rows; beyond the last one, `_ROW` of one row for each row."""
    costs = {r: seconds for (b, r), seconds in known.items() if b == num_choices}
    below = max(r for r in costs if r <= rows)
    if (above := min((r for r in costs if r >= rows), default=None)) is None:
        return costs[below] + _ROW * one * (rows - below)
    if above == below:
        return costs[below]
    return costs[below] + (costs[above] - costs[below]) * (rows - below) / (above - below)
