"""The drafts of running choices: what is decided and written before a block, and what is learnt from it afterwards.

Shapes: H hidden size.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ultrafuser.engine.certainty import Course
from ultrafuser.engine.choice import Choice
from ultrafuser.engine.drafting import run_ahead
from ultrafuser.engine.drafts import LENGTHS, PLAIN, DraftHistory, DraftKind, Lookup, Plan, Planner
from ultrafuser.engine.runner import Runner


@dataclass(slots=True)
class _Notes:
    """What is remembered of one choice."""

    history: DraftHistory
    lookup: Lookup | None = None
    looked_up: list[int] = field(default_factory=list)  # what a lookup says of the next tokens, read by all or not


class Drafts(NamedTuple):
    """The drafts of one block of every choice.

    Attributes:
        plan: What was decided.
        guesses: Tokens written for each choice.
        read: Of these, those that all specialists are to read.
        known: For each choice hidden states [rows, H] of views that have read the block already.
        is_joined: Who wrote them is such a view, so that the token before them is read, too.
        margins: Of every token written, those of all choices.
        seconds: That writing them took.
    """

    plan: Plan
    guesses: list[list[int]]
    read: list[list[int]]
    known: list[dict[int, Tensor]]
    is_joined: bool
    margins: list[Sequence[float]]
    seconds: float

    @property
    def rows(self) -> list[int]:
        """Positions of each choice whose next token is chosen."""
        return [len(tokens) if self.is_joined else len(tokens) + 1 for tokens in self.read]


class Speculation:
    """Drafts for the choices of one engine.

    Args:
        planner: Decides.
        runner: Runs whoever writes; views after those of the specialists are of a drafting model.
    """

    def __init__(self, planner: Planner, runner: Runner) -> None:
        self.planner, self.runner = planner, runner
        self._notes: dict[int, _Notes] = {}
        self._resting = 0  # steps in which nothing is decided

    def add(self, choice: Choice) -> None:
        """A choice begins."""
        self._notes[id(choice)] = _Notes(self.planner.make_history())

    def forget(self, choice: Choice) -> None:
        """A choice is over."""
        del self._notes[id(choice)]

    def clear(self) -> None:
        """All are over."""
        self._notes.clear()

    def decide(self, choices: Sequence[Choice]) -> Plan:
        """Who writes how much for the next block."""
        for choice in choices:
            self._notes[id(choice)].looked_up = []
        if not self.planner.kinds or len(choices) > self.planner.max_choices:
            return PLAIN
        histories = [self._notes[id(choice)].history for choice in choices]
        if self._resting:
            self._resting -= 1
            for history in histories:
                self.planner.pass_over(history, self.planner.kinds)
            return PLAIN
        began = time.perf_counter()
        room = min(map(_room, choices))
        possible: dict[DraftKind, int] = {}
        for kind in self.planner.kinds:
            if kind == "lookup":
                longest = max(self._look_up(choice) for choice in choices)
                if longest:
                    possible[kind] = min(longest, room)
            else:
                possible[kind] = room
        plan = self.planner.plan(len(choices), histories, possible)
        for history in histories:
            self.planner.pass_over(history, [kind for kind in possible if kind != plan.kind])
        self.planner.costs.observe_planning(len(choices), time.perf_counter() - began)
        self._resting = self.planner.rest_after(len(choices)) if plan.kind is None else 0
        return plan

    def write(self, choices: Sequence[Choice], plan: Plan) -> Drafts:
        """What a plan asks for."""
        is_joined = self.planner.is_joined(plan.kind)
        known: list[dict[int, Tensor]] = [{} for _ in choices]
        if plan.kind is None:
            return Drafts(plan, [[] for _ in choices], [[] for _ in choices], known, is_joined, [], 0.0)
        if plan.kind == "lookup":
            found = [self._notes[id(c)].looked_up[: min(plan.length, _room(c))] for c in choices]
            return Drafts(plan, found, found, known, is_joined, [], 0.0)
        began = time.perf_counter()
        course = self.planner.course(plan, [self._notes[id(choice)].history for choice in choices])
        views = [self._writer(choice, plan.kind) for choice in choices]
        guesses, states = run_ahead(self.runner, choices, views, plan.length, course)
        num_written = len(guesses[0])
        if is_joined:
            known = [{view: hidden} for view, hidden in zip(views, states, strict=True)]
        num_read = num_written if is_joined or course is None else course.pays()
        seconds = time.perf_counter() - began
        self.planner.costs.observe_feed(plan.kind, len(choices), seconds, num_written)
        read = [guess[:num_read] for guess in guesses]
        return Drafts(plan, guesses, read, known, is_joined, _margins(course), seconds)

    def learn(self, choice: Choice, row: int, drafts: Drafts, num_tokens: int) -> tuple[int, int]:
        """A block was read and gave the choice so many tokens.

        Args:
            choice: Whose.
            row: Its place among the drafts.
            drafts: Of the block.
            num_tokens: The last ones of its response.

        Returns:
            Tokens that were written for it, and how many of these were read and right.
        """
        if not num_tokens:
            return 0, 0
        notes, chosen, plan = self._notes[id(choice)], choice.response[-num_tokens:], drafts.plan
        if notes.looked_up:  # which costs nothing to compare, whoever drafted
            compared = min(len(notes.looked_up), len(chosen))
            as_planned = Plan("lookup", compared)
            self.planner.observe(notes.history, as_planned, _num_agreed(notes.looked_up, chosen), compared)
        guesses = drafts.guesses[row]
        if plan.kind is None or not guesses:
            return 0, 0
        # What was chosen says of one guess more than was read whether it is right.
        agreed, read = _num_agreed(guesses, chosen), len(drafts.read[row])
        if plan.is_open:
            margins = [at[row] for at in drafts.margins]
            self.planner.observe_course(notes.history, plan, margins, agreed=agreed, tokens=num_tokens, read=read)
        elif plan.kind != "lookup":
            self.planner.observe(notes.history, plan, agreed, len(guesses))
        return len(guesses), min(agreed, read)

    def _writer(self, choice: Choice, kind: DraftKind) -> int:
        """The view that runs ahead: of the heaviest specialist, or of the drafting model."""
        if kind == "model":
            return self.runner.num_specialists
        return max(range(len(choice.last_weights)), key=choice.last_weights.__getitem__)

    def _look_up(self, choice: Choice) -> int:
        """What the text itself says of the next tokens; how many there are."""
        notes, row = self._notes[id(choice)], max(choice.request.prompts, key=len)
        if notes.lookup is None:
            notes.lookup = Lookup(row)
        notes.lookup.extend(choice.response[len(notes.lookup.text) - len(row) :])
        notes.looked_up, notes.history.num_matched = notes.lookup.draft(LENGTHS[-1]), notes.lookup.num_matched
        return len(notes.looked_up)


def _room(choice: Choice) -> int:
    """Tokens that a draft may have: what follows the choice's last token cannot be used."""
    return choice.max_tokens - len(choice.response) - 1


def _margins(course: Course | None) -> list[Sequence[float]]:
    return [] if course is None else course.margins


def _num_agreed(guesses: Sequence[int], chosen: Sequence[int]) -> int:
    """Guesses until the first that was not chosen."""
    pairs = zip(guesses, chosen, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
