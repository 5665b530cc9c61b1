"""Speculation: who drafts, how far, and what a draft has to earn.

A draft is a guess at the next tokens. All specialists read it in one pass and the fused model chooses its own token at
every position, as it would have without; the guess is kept as far as it agrees. So a draft changes speed, nothing else.

Who drafts: the specialist with the largest weight at the last token (`self`), which runs ahead alone, in fewer bits
where there is such a copy of it, and is then joined by the others; the text itself (`lookup`): what followed when the
same tokens stood there before; or a small `model`.

Who drafts is decided before every block from what was measured: how often guesses of that kind agreed lately for this
choice, and what passes of that many rows cost. How far a lookup goes is decided then, too; who runs ahead decides token
by token (`certainty`). What the text itself says is compared in any case, which costs nothing; another guess that does
not pay is not made, and is tried again now and then.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ultrafuser.engine.certainty import Certainty, Course
from ultrafuser.engine.requests import Ids

DraftKind = Literal["self", "lookup", "model"]
LENGTHS = (2, 3, 4, 6, 8)
_KEEP = 0.9  # of an average at every observation: some ten blocks back
_KEEP_TYPICAL = 0.98  # the same for what is typical of all choices
_FIRST_RETRY, _LAST_RETRY = 16, 256  # tokens until a kind that did not pay is tried again
_GAIN = 1.05  # what a draft must promise before it is made
_OPEN_GAIN = 1.0  # the same where its writer stops by itself: little is lost, and something is learnt
_SHORTEST_PASS = 1e-3  # seconds: of shorter ones most is bookkeeping, which drafts do not save, and noise would decide
_PLANNING = 0.02  # of the time, at most, where nothing is drafted
_LONGEST_REST = 16  # tokens
_KEEP_BLOCKS = 0.97  # of averages over blocks, of which a few say little
_FIRST_BLOCKS = 8.0  # blocks that what is not known yet stands for
_TYPICAL_BLOCKS = 16.0  # the same for what was typical of earlier choices
_ROW = 0.1  # of a pass of one row: what a further row costs as long as nothing is known
_REDUCED = 0.4  # of a specialist's part of a pass: what it costs in fewer bits as long as nothing is known


class Plan(NamedTuple):
    """What to draft in the next block.

    Attributes:
        kind: Who drafts.
        length: Tokens; 0 is plain decoding.
        is_open: `length` is the most there may be: whoever drafts stops when it is not sure enough.
    """

    kind: DraftKind | None
    length: int
    is_open: bool = False


PLAIN = Plan(None, 0)
_Key = tuple[DraftKind, int]  # of a record: lookups have one for each number of tokens that agreed


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
        at, _ = self._find()
        return self.text[at : at + length] if at else []

    @property
    def num_matched(self) -> int:
        """Tokens that agree where a draft would come from; 0 where there is none."""
        return self._find()[1]

    def _find(self) -> tuple[int, int]:
        for size in self.sizes:
            if len(self.text) > size and (at := self._after.get(tuple(self.text[-size:]))):
                return at, size
        return 0, 0

    def _index(self) -> None:
        # An end of the text is indexed when something follows it, so that it never finds itself.
        for stop in range(max(self._indexed, 1), len(self.text)):
            for size in self.sizes:
                if stop >= size:
                    self._after[tuple(self.text[stop - size : stop])] = stop
        self._indexed = len(self.text)


@dataclass(slots=True)
class _Record:
    """How guesses of one kind fared for one choice: single ones, and blocks of those that run ahead.

    The first choice of all starts as one of which three guesses in four agree.
    """

    agreed: float = 3.0
    tried: float = 4.0
    blocks: float = _FIRST_BLOCKS
    tokens: float = 3 * _FIRST_BLOCKS  # that blocks gave
    drafted: float = 4 * _FIRST_BLOCKS  # written for them
    read: float = 4 * _FIRST_BLOCKS  # of these, what all read
    retry_after: int = _FIRST_RETRY
    tokens_without: int = 0

    @property
    def rate(self) -> float:
        return min(self.agreed / self.tried, 0.99)

    def observe(self, agreed: int, tried: int, keep: float = _KEEP) -> None:
        self.agreed = self.agreed * keep + agreed
        self.tried = self.tried * keep + tried

    def observe_block(self, tokens: int, drafted: int, read: int, keep: float = _KEEP_BLOCKS) -> None:
        self.blocks = self.blocks * keep + 1
        self.tokens = self.tokens * keep + tokens
        self.drafted = self.drafted * keep + drafted
        self.read = self.read * keep + read

    def as_first(self) -> _Record:
        """What a new choice starts from when this is typical."""
        n = _TYPICAL_BLOCKS / self.blocks
        blocks = (_TYPICAL_BLOCKS, self.tokens * n, self.drafted * n, self.read * n)
        return _Record(4 * self.rate, 4.0, *blocks, self.retry_after, self.tokens_without)


class DraftHistory:
    """What is remembered of the drafts of one choice.

    Args:
        typical: What was typical of earlier choices, from which it starts.

    Attributes:
        num_matched: Tokens that agree where a lookup would come from now: long matches fare otherwise than short ones.
    """

    def __init__(self, typical: Mapping[_Key, _Record] | None = None) -> None:
        self.records: dict[_Key, _Record] = defaultdict(_Record)
        for key, record in (typical or {}).items():
            self.records[key] = record.as_first()
        self.num_matched = 0

    def key(self, kind: DraftKind) -> _Key:
        """Which record a guess of this kind counts in now."""
        return kind, self.num_matched if kind == "lookup" else 0

    def record(self, kind: DraftKind) -> _Record:
        """How guesses like one of this kind now have fared."""
        return self.records[self.key(kind)]

    def observe(self, plan: Plan, agreed: int, length: int) -> None:
        """A block was read: of `length` guesses the first `agreed` were right."""
        assert plan.kind is not None
        record = self.record(plan.kind)
        record.observe(agreed, min(agreed + 1, length))
        record.tokens_without = 0


@dataclass(slots=True)
class Costs:
    """Running averages of what passes take, in seconds.

    The first pass of its kind and size does not count: kernels are made for it.
    """

    passes: dict[tuple[int, int], float] = field(default_factory=dict)  # by choices and rows of each
    joins: dict[tuple[int, int], float] = field(default_factory=dict)  # the same without the one that ran ahead
    feeds: dict[tuple[DraftKind, int], float] = field(default_factory=dict)  # a token drafted, by kind and choices
    rests: dict[DraftKind | None, float] = field(default_factory=dict)  # what else a step takes, by who drafted
    planning: dict[int, float] = field(default_factory=dict)  # deciding, by choices
    _met: set[tuple[str, object]] = field(default_factory=set)

    def observe_pass(self, num_choices: int, rows: int, seconds: float) -> None:
        """All specialists read `rows` tokens of each choice."""
        self._observe("passes", (num_choices, rows), seconds)

    def observe_join(self, num_choices: int, rows: int, seconds: float) -> None:
        """All specialists but the one that ran ahead read `rows` tokens of each choice."""
        self._observe("joins", (num_choices, rows), seconds)

    def observe_feed(self, kind: DraftKind, num_choices: int, seconds: float, num_tokens: int = 1) -> None:
        """A drafter wrote so many tokens of each choice, one after another."""
        self._observe("feeds", (kind, num_choices), seconds / num_tokens)

    def observe_rest(self, kind: DraftKind | None, seconds: float) -> None:
        """What a step took beside passes and drafted tokens: a small model's passes are as short as bookkeeping."""
        self._observe("rests", kind, seconds)

    def observe_planning(self, num_choices: int, seconds: float) -> None:
        """It was decided about drafts."""
        self._observe("planning", num_choices, seconds)

    def of_rest(self, kind: DraftKind | None) -> float:
        """What a step takes beside passes and drafted tokens, as far as that is known."""
        return self.rests.get(kind, self.rests.get(None, 0.0))

    def of_pass(self, num_choices: int, rows: int | float) -> float | None:
        """What a pass takes: as measured, or as passes of fewer and of more rows let expect."""
        one = self.passes.get((num_choices, 1))
        return None if one is None else _expect(self.passes, num_choices, rows, one)

    def of_join(self, num_choices: int, rows: int | float, one: float, share: float) -> float:
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
        self.certainty: dict[DraftKind, Certainty] = defaultdict(Certainty)
        self._typical: dict[_Key, _Record] = defaultdict(_Record)

    def make_history(self) -> DraftHistory:
        """For a new choice, which starts as what was typical of those before."""
        return DraftHistory(self._typical)

    def observe(self, history: DraftHistory, plan: Plan, agreed: int, length: int) -> None:
        """Guesses were compared: of `length` the first `agreed` were right."""
        assert plan.kind is not None
        history.observe(plan, agreed, length)
        typical = self._typical[history.key(plan.kind)]
        typical.observe(agreed, min(agreed + 1, length), _KEEP_TYPICAL)
        typical.tokens_without = 0

    def pass_over(self, history: DraftHistory, kinds: Iterable[DraftKind]) -> None:
        """A token was decoded without a guess of these kinds. New choices go on waiting where those before them did."""
        for kind in kinds:
            for record in (history.record(kind), self._typical[history.key(kind)]):
                record.tokens_without += 1

    def observe_course(
        self, history: DraftHistory, plan: Plan, margins: Sequence[float], *, agreed: int, tokens: int, read: int
    ) -> None:
        """An open draft was compared.

        Args:
            history: Of its choice.
            plan: Whose draft.
            margins: Of the tokens that were written.
            agreed: How many of these were right, as far as that is known.
            tokens: What the block gave.
            read: Tokens of the draft that all read.
        """
        assert plan.kind is not None
        compared = margins[: min(agreed + 1, tokens)]
        for number, margin in enumerate(compared):
            self.certainty[plan.kind].observe(margin, number < agreed)
        self.observe(history, plan, agreed, len(compared))
        history.record(plan.kind).observe_block(tokens, len(margins), read)
        self._typical[history.key(plan.kind)].observe_block(tokens, len(margins), read, _KEEP_TYPICAL)

    def plan(self, num_choices: int, histories: Sequence[DraftHistory], possible: dict[DraftKind, int]) -> Plan:
        """The block that promises the most tokens per second.

        Args:
            num_choices: In the batch.
            histories: Of these choices.
            possible: Longest draft of each kind that can be made now; kinds that cannot are missing.
        """
        one = self.costs.of_pass(num_choices, 1)
        if not possible or num_choices > self.max_choices or one is None or one < _SHORTEST_PASS:
            return PLAIN
        plain = 1 / (one + self.costs.of_rest(None))
        best, best_speed = PLAIN, _GAIN * plain
        for kind in self.kinds:
            longest = min(possible.get(kind, 0), LENGTHS[-1])
            if longest < LENGTHS[0]:
                continue
            records = [history.record(kind) for history in histories]
            if kind != "lookup":
                speed = self._open_speed(kind, num_choices, records, one)
                if speed > (best_speed if best.kind else _OPEN_GAIN * plain):
                    best, best_speed = Plan(kind, longest, is_open=True), speed
                continue
            rate = sum(record.rate for record in records) / len(records)
            for length in (n for n in LENGTHS if n <= longest):
                seconds = self._of_pass(kind, num_choices, length) + self.costs.of_rest(kind)
                speed = _expected(rate, length) / seconds
                if speed > best_speed:
                    best, best_speed = Plan(kind, length), speed
        if best.kind is None:
            return self._retry(histories, possible)
        self._wait(histories, best.kind, _FIRST_RETRY)
        return best

    def rest_after(self, num_choices: int) -> int:
        """Steps until it is worth deciding again after a step without a draft: deciding may take `_PLANNING` of all."""
        one, planning = self.costs.of_pass(num_choices, 1), self.costs.planning.get(num_choices)
        if one is None or planning is None:
            return 0
        if one < _SHORTEST_PASS:
            return _LONGEST_REST
        return min(int(planning / (_PLANNING * one)), _LONGEST_REST)

    def course(self, plan: Plan, histories: Sequence[DraftHistory]) -> Course | None:
        """Decides how far the draft of a plan goes, if that is open."""
        num_choices = len(histories)
        if not plan.is_open or plan.kind is None:
            return None
        kind = plan.kind
        one = self.costs.of_pass(num_choices, 1)
        assert one is not None, "an open plan follows from measured passes"
        records = [history.record(kind) for history in histories]
        return Course(
            self.certainty[kind],
            rate=sum(record.rate for record in records) / len(records),
            worth=1 / max(self._open_speed(kind, num_choices, records, one), 1 / one),
            feed=self._feed(kind, num_choices, one),
            of_pass=lambda length: self._of_pass(kind, num_choices, length),
        )

    def is_joined(self, kind: DraftKind | None) -> bool:
        """Whether who drafts has then read the block already, so that only the others read it."""
        return kind == "self" and not self.is_read_again

    def _open_speed(self, kind: DraftKind, num_choices: int, records: Sequence[_Record], one: float) -> float:
        """Tokens per second that open drafts of this kind have given lately, by what their parts cost."""
        tokens, drafted, read = (
            sum(total / record.blocks for total, record in zip(totals, records, strict=True)) / len(records)
            for totals in zip(*((r.tokens, r.drafted, r.read) for r in records), strict=True)
        )
        seconds = self._of_pass(kind, num_choices, read) + drafted * self._feed(kind, num_choices, one)
        seconds += self.costs.of_rest(kind)
        return float(tokens / seconds)

    def _retry(self, histories: Sequence[DraftHistory], possible: dict[DraftKind, int]) -> Plan:
        for kind in self.kinds:
            records = [history.record(kind) for history in histories]
            longest = min(possible.get(kind, 0), LENGTHS[-1])
            if longest >= LENGTHS[0] and all(r.tokens_without >= r.retry_after for r in records):
                self._wait(histories, kind, min(2 * max(r.retry_after for r in records), _LAST_RETRY))
                return Plan(kind, LENGTHS[0]) if kind == "lookup" else Plan(kind, longest, is_open=True)
        return PLAIN

    def _wait(self, histories: Sequence[DraftHistory], kind: DraftKind, tokens: int) -> None:
        """A kind that does not pay is tried again after so many tokens."""
        for history in histories:
            history.record(kind).retry_after = self._typical[history.key(kind)].retry_after = tokens

    def _of_pass(self, kind: DraftKind, num_choices: int, length: int | float) -> float:
        """What reading a draft of `length` tokens takes."""
        one = self.costs.of_pass(num_choices, 1)
        whole = self.costs.of_pass(num_choices, length + 1)
        assert one is not None, "a pass of one row was measured"
        assert whole is not None, "a pass of one row was measured"
        if not self.is_joined(kind):
            return whole
        return self.costs.of_join(num_choices, max(length, 1), one, 1 - 1 / self.num_specialists)

    def _feed(self, kind: DraftKind, num_choices: int, one: float) -> float:
        """What writing a token of a draft takes."""
        part = one / self.num_specialists
        guess = _REDUCED * part if kind == "self" and self.is_read_again else part
        return self.costs.feeds.get((kind, num_choices), guess)


def _expected(rate: float, length: int) -> float:
    """Tokens of a block whose guesses agree at this rate: one more follows the last guess."""
    return float(sum(rate**i for i in range(length + 1)))


def _expect(known: Mapping[tuple[int, int], float], num_choices: int, rows: int | float, one: float) -> float:
    """A line between the nearest measured numbers of rows; beyond the last one, `_ROW` of one row for each row."""
    costs = {r: seconds for (b, r), seconds in known.items() if b == num_choices}
    below = max(r for r in costs if r <= rows)
    if (above := min((r for r in costs if r >= rows), default=None)) is None:
        return costs[below] + _ROW * one * (rows - below)
    if above == below:
        return costs[below]
    return costs[below] + (costs[above] - costs[below]) * (rows - below) / (above - below)
