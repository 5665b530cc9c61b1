"""The live table: numbers from what is recorded, time from a clock that the test holds."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from synthesis_helpers import make_node
from ultrafuser.synthesis.asking.writer import Recorded
from ultrafuser.synthesis.node import Answer
from ultrafuser.synthesis.progress import LINE_S, PlainProgress, Progress, live_table
from ultrafuser.synthesis.queue import Failed, Finished, Postponed, Spent
from ultrafuser.synthesis.storage.counts import StageCount


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def answered(*numbers: int, unreadable: str | None = None) -> Recorded:
    nodes = [make_node(number) for number in numbers]
    answer = Answer("text", "stop", 10, 20, 0.5, "m")
    return Recorded({n.key: n for n in nodes}, tuple(Finished(n, answer, (), unreadable) for n in nodes))


def count(**nodes: int) -> StageCount:
    return StageCount("text", "responses", nodes, {"kept": 3, "dropped": 2}, {"length": 2}, Spent(7, 70, 140, 3.5))


@pytest.fixture
def clock() -> Clock:
    return Clock()


def row_of(progress: Progress) -> Any:
    return progress.rows["text", "responses"]


def test_it_starts_from_what_the_store_counts(clock: Clock) -> None:
    progress = Progress(clock)

    progress.start([count(answered=6, unreadable=1, waiting=90, claimed=10, failed=2)])

    row = row_of(progress)
    assert (row.done, row.unreadable, row.waiting, row.failed, row.kept, row.dropped) == (7, 1, 100, 2, 3, 2)
    assert (row.tokens, row.cost) == (210, 3.5)


def test_what_is_recorded_moves_the_numbers(clock: Clock) -> None:
    progress = Progress(clock)
    progress.start([count(waiting=10)])

    progress.recorded(answered(1, 2))
    progress.recorded(answered(3, unreadable="no list"))
    node = make_node(4)
    progress.recorded(Recorded({node.key: node}, failed=(Failed(node.key, "too long"),)))

    row = row_of(progress)
    assert (row.done, row.unreadable, row.waiting, row.failed) == (3, 1, 6, 1)
    assert (row.tokens, row.cost) == (210 + 90, 3.5 + 1.5)


def test_speed_is_that_of_the_last_half_minute(clock: Clock) -> None:
    progress = Progress(clock)
    progress.start([count(waiting=100)])
    for number in range(100):
        clock.now += 1.0
        progress.recorded(answered(2 * number, 2 * number + 1))

    requests, tokens = progress.speed()

    assert requests == pytest.approx(2.0, rel=0.05)
    assert tokens == pytest.approx(60.0, rel=0.05)


def test_time_left_is_what_waits_over_the_speed(clock: Clock) -> None:
    progress = Progress(clock)
    progress.start([count(waiting=110)])
    assert progress.left_s() is None

    clock.now += 10.0
    progress.recorded(answered(*range(10)))

    assert progress.left_s() == pytest.approx(100.0)
    assert "1 min 40 s left" in progress.line()


def test_when_it_stands_still_the_line_says_what_went_wrong_last(clock: Clock) -> None:
    progress = Progress(clock)
    progress.start([count(waiting=10)])
    node = make_node(1)
    progress.recorded(Recorded({node.key: node}, postponed=(Postponed(node.key, 0.0, "no connection"),)))
    clock.now += 60.0

    assert "standing still; last problem: no connection" in progress.line()


def test_the_table_shows_every_stage_and_the_sum(clock: Clock) -> None:
    progress = Progress(clock)
    progress.start([count(waiting=1234), StageCount("text", "weak", {"answered": 5})])
    out = io.StringIO()

    Console(file=out, width=140).print(progress.table())

    assert "1,234" in out.getvalue()
    assert "weak" in out.getvalue()
    assert "3.50 spent" in out.getvalue()


def test_elsewhere_a_line_is_written_now_and_then(clock: Clock, capsys: Any) -> None:
    progress = PlainProgress(clock)
    progress.start([count(waiting=1000)])
    for number in range(100):
        clock.now += LINE_S / 20
        progress.recorded(answered(number))

    assert 5 <= len(capsys.readouterr().err.splitlines()) <= 6


def test_without_a_terminal_lines_go_to_stderr(capsys: Any) -> None:
    with live_table() as progress:
        progress.start([count(waiting=10)])
        progress.recorded(answered(1))

    shown = capsys.readouterr()
    assert shown.out == ""
    assert "10 waiting" in shown.err
