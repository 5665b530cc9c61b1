"""`kill -9` at random moments loses no finished answer and repeats at most what was under way."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from synthesis_endpoint import serving_process
from synthesis_runs import starting_runs
from synthesis_stores import make_recipe
from ultrafuser.synthesis.pipeline import run_synthesis

# The numbers, at which it takes two minutes, are run by SYNTHESIS_KILL_NODES=20000.
NUM_NODES = int(os.environ.get("SYNTHESIS_KILL_NODES", "2000"))
NUM_KILLS = 10
CONCURRENCY = 32


def calls_of(url: str) -> dict[str, int]:
    with urllib.request.urlopen(url.removesuffix("/v1") + "/calls") as reply:
        return json.loads(reply.read())


@pytest.mark.slow
def test_ten_kills_lose_nothing_and_repeat_at_most_what_was_under_way(tmp_path: Path):
    rng = random.Random(5)
    with serving_process(latency_s=0.02) as url, starting_runs() as runs:
        recipe = make_recipe(tmp_path, url=url, endpoint={"concurrency": CONCURRENCY})
        (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
        num_kills = 0
        # Each process is killed after its part of the answers, give or take, and sometimes as soon as it has started.
        for number in range(1, NUM_KILLS + 1):
            process = runs.start(tmp_path / "recipe.json", NUM_NODES)
            process.await_open()
            until = NUM_NODES * (number - rng.random()) / (NUM_KILLS + 1)
            while process.poll() is None and calls_of(url)["answered"] < until:
                time.sleep(rng.random() / 20)
            assert process.poll() is None, "it ended before it could be killed"
            process.kill()
            num_kills += process.wait() == -9
            assert integrity(tmp_path) == "ok"
        before = time.monotonic()
        last = runs.start(tmp_path / "recipe.json", NUM_NODES)
        assert last.wait() == 0, last.output
        calls = calls_of(url)

    states, num_items = counts(tmp_path)
    print(f"{NUM_NODES} nodes, {num_kills} kills: {calls}; the last process took {time.monotonic() - before:.1f} s")
    assert num_kills == NUM_KILLS
    assert states == {"answered": NUM_NODES}
    assert num_items == NUM_NODES
    assert integrity(tmp_path) == "ok"
    assert calls["distinct_answered"] == NUM_NODES
    assert calls["repeated"] <= CONCURRENCY * NUM_KILLS
    assert calls["total"] - NUM_NODES <= CONCURRENCY * NUM_KILLS
    assert calls["most_at_once"] <= CONCURRENCY
    assert f"in all {NUM_NODES}, " in last.output


@pytest.mark.slow
def test_a_data_set_is_the_same_however_often_its_making_was_killed(tmp_path: Path):
    rng = random.Random(7)
    settings = {"meta_topics": 2, "sub_topics": 6, "records": 24}
    how = {"endpoint": {"concurrency": 8}, "domains": {"cooking": {"settings": settings}}}
    with serving_process(latency_s=0.02) as url, starting_runs() as runs:
        calm, wild = (make_recipe(tmp_path / name, url=url, **how) for name in ("calm", "wild"))
        run_synthesis(calm)
        num_calls = calls_of(url)["answered"]
        (tmp_path / "recipe.json").write_text(wild.model_dump_json())
        for number in range(1, 5):
            process = runs.start(tmp_path / "recipe.json", 0)
            process.await_open()
            until = num_calls * (1 + (number - rng.random()) / 5)
            while process.poll() is None and calls_of(url)["answered"] < until:
                time.sleep(rng.random() / 50)
            process.kill()
            process.wait()
        last = runs.start(tmp_path / "recipe.json", 0)
        assert last.wait() == 0, last.output
        assert calls_of(url)["answered"] - 2 * num_calls <= 4 * 8

    columns = "key, node, parent, stage, round, text, detail, state, gate, reason, replaced_by"
    first, second = (rows(tmp_path / name, f"SELECT {columns} FROM item ORDER BY key") for name in ("calm", "wild"))
    assert len(first) > 60
    assert first == second
    rounds = [rows(tmp_path / name, "SELECT * FROM round ORDER BY domain, stage, round") for name in ("calm", "wild")]
    assert rounds[0] == rounds[1]


def rows(folder: Path, query: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(folder / "nodes.sqlite") as connection:
        return connection.execute(query).fetchall()


def integrity(folder: Path) -> str:
    with sqlite3.connect(folder / "nodes.sqlite") as connection:
        return connection.execute("PRAGMA integrity_check").fetchone()[0]


def counts(folder: Path) -> tuple[dict[str, int], int]:
    with sqlite3.connect(folder / "nodes.sqlite") as connection:
        states = dict(connection.execute("SELECT state, count(*) FROM node GROUP BY state"))
        return states, connection.execute("SELECT count(*) FROM item").fetchone()[0]
