"""Runs of several processes for the tests of parallel training: a server that forks ranks, and the jobs they do.

Run as a script this file is that server: it imports everything once, then forks the ranks of each run, so that a run
of three processes starts in milliseconds.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from training_helpers import damage_writing, make_fused, make_phase
from ultrafuser.config.training import LoraConfig, ParallelConfig
from ultrafuser.train.adapters import give_adapters
from ultrafuser.train.loop import Loop
from ultrafuser.train.parallel.fsdp import FullyShard
from ultrafuser.train.parallel.shards import whole
from ultrafuser.train.parallel.single import Single
from ultrafuser.train.parallel.world import World, begin_world

ALONE_S = 900.0  # a run that takes longer hangs, even on a busy machine


class Ended(NamedTuple):
    """How a rank ended: its exit code (negative: the signal) and what it said."""

    code: int
    said: str


class RankServer:
    """Forks the ranks of runs."""

    def __init__(self) -> None:
        paths = [str(Path(__file__).parent.parent / "src"), str(Path(__file__).parent)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, job: str, folder: Path, size: int, **arguments: Any) -> list[Ended]:
        """Run a job of `JOBS` in so many processes and wait for all of them.

        `kill` names a rank and a number, sent once `file` holds so many `lines`.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        folder.mkdir(parents=True, exist_ok=True)
        request = {"job": job, "folder": str(folder), "size": size, **arguments}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return [Ended(*ended) for ended in json.loads(self.process.stdout.readline())]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def rank_server() -> Iterator[RankServer]:
    server = RankServer()
    try:
        yield server
    finally:
        server.close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def strategy_of(world: World, parallel: Mapping[str, Any], *, bf16: bool) -> Any:
    return FullyShard(world, ParallelConfig(**parallel), bf16=bf16) if world.size > 1 else Single(world)


def run_phases(folder: Path, runs: Mapping[str, Mapping[str, Any]], **_: Any) -> None:
    """Train phases that are made in memory; of each leave `<run>/final.safetensors` beside its metrics."""
    with begin_world("cpu", timeout_s=60.0) as world:
        for name, run in runs.items():
            train: Mapping[str, Any] = run.get("train", {})
            torch.manual_seed(0)
            model = make_fused(**run.get("model", {}))
            if run.get("untied"):
                untie(model)
            model.to(getattr(torch, run.get("dtype", "float32")))
            if run.get("lora"):
                give_adapters(model, LoraConfig(rank=2), seed=0)
            phase = make_phase(folder / name, model=model, name=name, stage=run.get("stage", {}), train=train)
            strategy = strategy_of(world, run.get("parallel", {}), bf16=train.get("precision") == "bf16")
            with world.in_turn():
                loop = Loop(phase, strategy)
            loop.run()
            final = {name: whole(p.detach()).contiguous() for name, p in model.named_parameters()}
            if world.is_main:
                save_file(final, folder / name / "final.safetensors")
            world.barrier()


def run_slow(folder: Path, timeout_s: float, takes_s: float, **_: Any) -> None:
    """The first process is busy alone for so long."""
    del folder
    with begin_world("cpu", timeout_s=timeout_s) as world:
        with world.together():
            time.sleep(takes_s * world.is_main)
        assert world.gather(world.rank) == [*range(world.size)]


def untie(model: Any) -> None:
    """Give every specialist a head of its own, of other values than its embedding."""
    for specialist in model.specialists.values():
        head = specialist.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone() * 0.5)
        specialist.config.tie_word_embeddings = False


def run_command(
    folder: Path, overrides: Sequence[str] = (), overrides_of: Mapping[str, Sequence[str]] = {}, **_: Any
) -> None:
    """`ultrafuser train` as a user calls it; `overrides_of` those of one rank."""
    from ultrafuser.cli.main import run

    overrides = [*overrides, *overrides_of.get(os.environ.get("RANK", "0"), ())]
    sys.argv = ["ultrafuser", "train", str(folder / "tiny.yaml"), *(part for o in overrides for part in ("--set", o))]
    run()


JOBS: dict[str, Callable[..., None]] = {"phases": run_phases, "command": run_command, "slow": run_slow}


def _serve() -> None:
    torch.set_num_threads(1)
    # What a run imports on its way, so that no rank has to.
    for module in ("torch.utils.tensorboard", "ultrafuser.cli.main", "ultrafuser.train.pipeline", "torch._dynamo"):
        with suppress(ImportError):
            importlib.import_module(module)
    for line in sys.stdin:
        print(json.dumps(_run_ranks(json.loads(line))), flush=True)


def _run_ranks(request: Mapping[str, Any]) -> list[tuple[int, str]]:
    folder, size, port = Path(request["folder"]), request["size"], free_port()
    ranks = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            _run_rank(request, folder, rank, size, port)
        ranks.append(child)
    statuses = _await(ranks, request)
    said = [(folder / f"said-{rank}").read_text(errors="replace") for rank in range(size)]
    return [(os.waitstatus_to_exitcode(status), text) for status, text in zip(statuses, said, strict=True)]


def _await(ranks: Sequence[int], request: Mapping[str, Any]) -> list[int]:
    """Wait for all; send the signal asked for once a file holds so many lines; end those that hang."""
    wanted, deadline = request.get("kill"), time.monotonic() + ALONE_S
    statuses: dict[int, int] = {}
    while len(statuses) < len(ranks):
        for child in ranks:
            if child not in statuses:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    statuses[child] = status
        if wanted is not None and _num_lines(Path(request["folder"]) / wanted["file"]) >= wanted["lines"]:
            os.kill(ranks[wanted["rank"]], wanted["number"])
            wanted = None
        if time.monotonic() > deadline:
            for child in set(ranks) - set(statuses):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    return [statuses[child] for child in ranks]


def _num_lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def _run_rank(request: Mapping[str, Any], folder: Path, rank: int, size: int, port: int) -> None:
    code = 0
    if size > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        with (folder / f"said-{rank}").open("w") as file:
            os.dup2(file.fileno(), 2)
            os.dup2(file.fileno(), 1)
        if limit := request.get("size_limits", {}).get(str(rank)):
            damage_writing(limit)
        arguments = {key: value for key, value in request.items() if key not in ("job", "folder", "size")}
        JOBS[request["job"]](folder, **arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        import traceback

        traceback.print_exc()
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 99
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
