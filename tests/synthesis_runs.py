"""Runs as processes of their own, to be killed: each is forked by one that has everything imported.

Run as a script this file is that one, or a single run: `python synthesis_runs.py RECIPE.json NODES`. A run's one domain
has a single stage of so many requests; with 0 it is what the recipe says.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from forking import fork
from synthesis_stores import CountingStage, make_plan
from ultrafuser.synthesis.pipeline import Pipeline, plan_domains, prepare
from ultrafuser.synthesis.recipe import SynthesisRecipe
from ultrafuser.synthesis.storage.store import Store


class Run:
    """One run that has been started, with what it printed in a file."""

    def __init__(self, runs: Runs, pid: int, output: Path) -> None:
        self._runs, self.pid, self._output = runs, pid, output

    @property
    def output(self) -> str:
        return self._output.read_text()

    def poll(self) -> int | None:
        """Its exit code, negative a signal's; None while it runs."""
        return self._runs.order("poll", self.pid)

    def await_open(self) -> None:
        """Until its database is open."""
        while not self.output.startswith("open\n"):
            assert self.poll() is None, self.output
            time.sleep(0.005)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Its exit code."""
        code = self._runs.order("wait", self.pid)
        assert code is not None
        return code


class Runs:
    """Starts runs."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._number = 0

    def start(self, recipe: Path, num_nodes: int) -> Run:
        self._number += 1
        output = recipe.with_name(f"run-{self._number}.txt")
        output.touch()
        pid = self.order("start", str(recipe), num_nodes, str(output))
        assert pid is not None
        return Run(self, pid, output)

    def order(self, *words: str | int) -> int | None:
        """What the one that forks answers."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        answer: int | None = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def starting_runs() -> Iterator[Runs]:
    runs = Runs()
    try:
        yield runs
    finally:
        runs.close()


def _fork_as_ordered() -> None:
    codes: dict[int, int] = {}
    for line in sys.stdin:
        order, *words = json.loads(line)
        if order == "start":
            recipe, num_nodes, output = words
            answer: int | None = fork(partial(main, Path(recipe), num_nodes), Path(output))
        else:
            (pid,) = words
            if pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG if order == "poll" else 0)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            answer = codes.get(pid)
        print(json.dumps(answer), flush=True)


def main(recipe_path: Path, num_nodes: int) -> None:
    """Go on with the run."""
    recipe = SynthesisRecipe.model_validate_json(recipe_path.read_text())
    stages = [CountingStage("meta_topics", num_nodes, num_words=1)]
    plans = [make_plan(*stages)] if num_nodes else plan_domains(recipe)
    with Store.open(recipe) as store:
        prepare(store, plans)
        print("open", flush=True)
        summary = asyncio.run(Pipeline(recipe, store, plans).run())
    print(summary.text())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        _fork_as_ordered()
