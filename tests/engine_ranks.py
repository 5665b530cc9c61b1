"""What every rank of test_engine_parallel.py runs, and the plays that one process runs, too.

python tests/engine_ranks.py '[["FOLDER", ["MODEL:PLAY,PLAY", ...]], ...]' imports once and forks three ranks for each
folder, all launches side by side.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine_helpers import CONTEXT, Heard, always_draft, finish, greedy, random_prompts, run
from forking import fork
from ultrafuser.engine.engine import Engine
from ultrafuser.engine.options import EngineOptions
from ultrafuser.engine.parallel import ParallelRunner, close_ranks, run_rank
from ultrafuser.engine.ranks import join_ranks
from ultrafuser.engine.requests import GenerationRequest
from ultrafuser.engine.runner import Runner
from ultrafuser.errors import UltrafuserError
from ultrafuser.generation import SamplingParams

NUM_RANKS = 3
OPTIONS = EngineOptions(max_context=CONTEXT, max_choices=4, drafts=("lookup", "self"), max_draft_choices=0, chunk=16)
MIX = (
    greedy(7, 21, 12, seed=1, max_tokens=14, ignore_end=True),
    greedy(30, 5, 9, seed=2, max_tokens=6),
    greedy(2, 3, 1, seed=3, max_tokens=20, log_probs=3),
    greedy(40, 44, 50, seed=4, max_tokens=3, n=2),
    greedy(11, 11, 11, seed=5, max_tokens=9, without=("code",)),
    greedy(4, 9, 2, seed=7, max_tokens=9, weights={"text": 1.0, "math": 3.0}),
    GenerationRequest(random_prompts(12, seed=8) * 3, SamplingParams(max_tokens=4, log_probs=2), score_prompt=True),
    greedy(1, 1, 1, seed=6, max_tokens=1),
)


def say(*heard: Heard) -> list[Any]:
    """What was heard, as JSON: per choice the tokens, why it ended, the weights; and what the prompt scored."""
    return [
        {
            "ids": [one.ids(choice) for choice in range(one.num_choices)],
            "reasons": one.reasons,
            "weights": [one.weights(choice).tolist() for choice in range(one.num_choices)],
            "prompt": [piece.log_prob for piece in one.prompt],
            "log_probs": [[piece.log_prob for piece in pieces] for pieces in one.pieces],
        }
        for one in heard
    ]


def play_mix(engine: Engine) -> list[Any]:
    """More requests than slots."""
    return say(*run(engine, *MIX))


def play_joins(engine: Engine) -> list[Any]:
    """Requests that come and go while others run; two are cancelled."""
    heard = [Heard(request.params.n) for request in MIX]
    added: list[Any] = []

    def before_step(number: int) -> None:
        if number % 2 == 0 and len(added) < len(MIX):
            added.append(engine.add(MIX[len(added)], heard[len(added)]))
        if number in (5, 11):
            for choice in added[0 if number == 5 else 2]:
                choice.cancelled = True

    before_step(0)
    finish(engine, before_step)
    return say(*heard)


def play_drafts(engine: Engine) -> list[Any]:
    """Lookups and drafts of one specialist take turns."""
    engine.planner.max_choices = 4
    always_draft(engine, "lookup", "self")
    heard = run(engine, *MIX)
    assert engine.stats().drafted_tokens > 0
    return say(*heard)


def play_count(engine: Engine) -> list[Any]:
    """Sums and messages of one request of twelve tokens, and of four requests in one batch."""
    if not isinstance(engine.runner, ParallelRunner):
        return []
    ranks, counts = engine.runner.ranks, []
    for requests in (MIX[:1], [greedy(5, 6, 7, seed=s, max_tokens=14, ignore_end=True) for s in range(3)]):
        sums, messages, steps = ranks.num_collectives, ranks.num_messages, engine.stats().steps
        run(engine, *requests)
        counts.append([ranks.num_collectives - sums, ranks.num_messages - messages, engine.stats().steps - steps])
    return counts


def play_memory(engine: Engine) -> list[Any]:
    """The second rank has too little memory once; what ran ends and the engine goes on."""
    heard = Heard()
    engine.add(greedy(60, 60, 60, seed=1), heard)
    error = _failure(lambda: finish(engine))
    engine.fail_all("out of memory")
    return [error, *say(*run(engine, MIX[0]))]


def play_killed(engine: Engine) -> list[Any]:
    """The last rank is killed in the middle."""
    return _lose(engine, signal.SIGKILL)


def play_hung(engine: Engine) -> list[Any]:
    """The last rank stops in the middle."""
    return _lose(engine, signal.SIGSTOP)


def play_second_hung(engine: Engine) -> list[Any]:
    """A rank stops that is not the last, and is not ready for the next message."""
    return _lose(engine, signal.SIGSTOP, rank=1, num_messages=2)


def _lose(engine: Engine, how: signal.Signals, *, rank: int = 2, num_messages: int = 0) -> list[Any]:
    heard = Heard()
    engine.add(MIX[2], heard)
    for _ in range(8):
        engine.step()
    pid = int(Path(f"pid-{rank}").read_text())
    os.kill(pid, how)
    start = time.monotonic()

    def go_on() -> None:
        assert isinstance(engine.runner, ParallelRunner)
        for _ in range(num_messages):
            engine.runner.ranks.send({"orders": [], "question": None})
        finish(engine)

    errors = [_failure(go_on), _failure(lambda: finish(engine))]
    seconds = time.monotonic() - start
    if how == signal.SIGSTOP:
        os.kill(pid, signal.SIGKILL)
    return [*errors, seconds, len(heard.ids())]


def _failure(work: Callable[[], object]) -> str:
    try:
        work()
    except (UltrafuserError, torch.OutOfMemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def _fail_once() -> None:
    """Let a pass of many tokens end as the CPU's allocator does."""
    usual = Runner.hidden

    def hidden(self: Runner, feeds: Any) -> Any:
        if max(len(tokens) for feed in feeds.values() for tokens in feed.tokens) > 12:
            Runner.hidden = usual  # type: ignore[method-assign]
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return usual(self, feeds)

    Runner.hidden = hidden  # type: ignore[method-assign]


PLAYS: dict[str, Callable[[Engine], list[Any]]] = {
    "mix": play_mix,
    "joins": play_joins,
    "drafts": play_drafts,
    "count": play_count,
    "memory": play_memory,
    "killed": play_killed,
    "hung": play_hung,
    "second_hung": play_second_hung,
}


def run_jobs(rank: int, jobs: Sequence[str]) -> None:
    """Each play on a model of its own folder: MODEL:PLAY,PLAY."""
    Path(f"pid-{rank}").write_text(str(os.getpid()))
    results: dict[str, Any] = {}
    join_ranks(timeout_s=60.0)  # and not once for each model
    for job in jobs:
        model, _, plays = job.partition(":")
        if "memory" in plays and rank == 1:
            _fail_once()
        try:
            engine = run_rank(model, OPTIONS, timeout_s=2.0 if "hung" in plays else 60.0)
        except UltrafuserError as error:
            Path(f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
            return
        if engine is None:
            continue
        for play in plays.split(","):
            results[f"{model}:{play}"] = PLAYS[play](engine)
        Path("results.json").write_text(json.dumps(results))
        close_ranks(engine)
    dist.destroy_process_group()


def fork_ranks(folder: str, jobs: Sequence[str]) -> list[int]:
    """Start the ranks of one launch; their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def be(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS), "GLOO_SOCKET_IFNAME": "lo"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.chdir(folder)
        run_jobs(rank, jobs)

    return [fork(partial(be, rank), Path(folder, f"log-{rank}")) for rank in range(NUM_RANKS)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    children = [child for folder, jobs in json.loads(sys.argv[1]) for child in fork_ranks(folder, jobs)]
    for child in children:
        os.waitpid(child, 0)
