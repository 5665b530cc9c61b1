"""The processes of one run: which of them this is, on what device, and what they tell each other.

`torchrun` starts them and says so in the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). A run of
one process knows none of this: its world has size 1, no process group, and every exchange here returns at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultrafuser.errors import ConfigError, TrainingError, UltrafuserError
from ultrafuser.model.device import choose_device

# What one process does while the others wait (loading, saving) may take hours; one that dies is noticed at once.
_PATIENCE = timedelta(days=1)
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_TOLD = "ultrafuser/told"
_LINGER_S = 5.0


@dataclass(frozen=True, slots=True)
class World:
    """One process among those of its run.

    Attributes:
        rank: Number of this process, from 0.
        size: Of how many.
        local_rank: Its number on this machine.
        device: What it computes on.
        turns: The most processes on one machine.
        control: Process group (gloo) of what is told here; None in a world of one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009  it cannot be changed
    turns: int = 1
    control: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all."""
        self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        """A plain value of each process, in order of rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def any(self, claim: bool) -> bool:
        """Whether it is true in some process."""
        return bool(self.add_up(torch.tensor([float(claim)], dtype=torch.float64)).item() > 0)

    def add_up(self, values: Tensor) -> Tensor:
        """The sum over all processes of a tensor on the CPU; the same to the bit in each of them."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total, group=self.control)
        return total

    def agree(self, what: str, value: object) -> None:
        """All processes must have the same value.

        Args:
            what: Its name in the message.
            value: Anything that JSON can write.

        Raises:
            ConfigError: They have not; in all of them.
        """
        mine = hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
        if others := [rank for rank, theirs in enumerate(self.gather(mine)) if theirs != mine]:
            ranks = ", ".join(map(str, others))
            raise ConfigError(
                f"process {self.rank} has another {what} than process {ranks} (of {self.size}): all must read the same "
                "recipe, data, models and package"
            )

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is done inside succeeds in all processes, or fails in all.

        Raises:
            TrainingError: It failed in another process; says what and where.
        """
        try:
            yield
        except Exception as error:
            self._meet(error)
            raise
        self._meet()

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """The processes of a machine one after another, as where each holds a whole model for a moment.

        Nothing inside may wait for another process.

        Raises:
            TrainingError: It failed in another process, before or after.
        """
        for _ in range(self.local_rank):
            self._meet()
        try:
            yield
        except Exception as error:
            self._meet(error)
            raise
        for _ in range(self.local_rank, self.turns):
            self._meet()

    def _meet(self, error: Exception | None = None) -> None:
        """Wait for all and hear how they fare."""
        if self.size == 1:
            return
        text = None if error is None else str(error) if isinstance(error, UltrafuserError) else repr(error)
        said = self.gather(text)
        if error is not None:
            return
        for rank, text in enumerate(said):
            if text is not None:
                raise TrainingError(f"process {rank} of {self.size}: {text}")


def lost_peer(error: BaseException) -> str | None:
    """What a broken exchange says, on one line; None where the error is none of those.

    gloo raises plain RuntimeErrors, wherever its work is waited for: in a backward pass, too.
    """
    text = " ".join(str(error).split())
    broken = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text.lower())
    # What is for developers is left out: the place in the sources before it, advice behind it.
    return text.rpartition("] ")[2].split(" This is typically")[0][:200] or text[:200] if broken else None


@contextlib.contextmanager
def begin_world(device: str | None = None, *, timeout_s: float = 1800.0) -> Iterator[World]:
    """Join the processes that a launcher started, and leave them in the end; without a launcher: a world of one.

    An error that leaves this context is marked as told (`UltrafuserError.is_told`) where another process of the run
    told one before: of several messages about one fault only the first is of use.

    Args:
        device: The recipe's; None or "cuda" mean the GPU of this process's number, if there are GPUs.
        timeout_s: Longest wait for another process within a step.

    Raises:
        ConfigError: The environment is no launcher's, the device is not there, or others do not come.
        TrainingError: A process ended or does not answer.
    """
    rank, size, local_rank = read_environment()
    if size == 1:
        yield World(device=choose_device(device, "train.device"))
        return
    here = device_of(local_rank, device)
    if here.type == "cuda":
        # Else a lost process ends the others from within NCCL, and nobody can say why.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        torch.cuda.set_device(here)
    ours = not dist.is_initialized()
    if ours:
        _join(here, timeout_s, size)
    try:
        control = dist.new_group(backend="gloo", timeout=_PATIENCE)
        alone = World(rank, size, local_rank, here, 1, control)
        turns = max(alone.gather(local_rank)) + 1
        yield World(rank, size, local_rank, here, turns, control)
    except UltrafuserError as error:
        error.is_told = not _is_first_to_tell()
        raise
    except RuntimeError as error:
        if (reason := lost_peer(error)) is None:
            raise
        lost = TrainingError(f"a process of this run ended or does not answer ({reason}): start again")
        lost.is_told = not _is_first_to_tell()
        raise lost from error
    finally:
        # After a fault NCCL may wait for ever for what is under way; the process ends anyhow.
        if ours and (here.type != "cuda" or sys.exception() is None):
            dist.destroy_process_group()


def read_environment() -> tuple[int, int, int]:
    """Rank, number of processes and rank on this machine, as the launcher says; 0, 1, 0 without one.

    Raises:
        ConfigError: Some of it is missing, or no number that fits.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return 0, 1, 0
    if missing := [name for name in _ENVIRONMENT if name not in os.environ]:
        raise ConfigError(
            f"this looks like one of several processes, but {', '.join(missing)} is not set: start them with torchrun "
            "(docs/training.md), or unset RANK and WORLD_SIZE"
        )
    values = {name: os.environ[name] for name in _ENVIRONMENT[:3]}
    if bad := [f"{name}={value}" for name, value in values.items() if not value.isdecimal()]:
        raise ConfigError(f"{bad[0]} in the environment is no number: start the processes with torchrun")
    rank, size, local_rank = (int(value) for value in values.values())
    if not (rank < size and local_rank <= rank):
        raise ConfigError(
            f"RANK={rank}, WORLD_SIZE={size} and LOCAL_RANK={local_rank} do not fit together: ranks count from 0 to "
            "WORLD_SIZE - 1; start the processes with torchrun"
        )
    return rank, size, local_rank


def device_of(local_rank: int, name: str | None) -> torch.device:
    """The device of one of several processes of a machine.

    Raises:
        ConfigError: It is not there, or all would share one GPU.
    """
    if name not in (None, "cuda"):
        device = choose_device(name, "train.device")
        if device.type == "cuda":
            raise ConfigError(
                f"train.device {name!r} is one GPU, but each of several processes needs its own: write cuda, or leave "
                "train.device out"
            )
        return device
    if name is None and not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= (count := torch.cuda.device_count()):
        raise ConfigError(
            f"there are {count} GPUs here, and process {local_rank} of this machine needs one of its own: start "
            f"{count} processes (torchrun --nproc-per-node {count}), or set train.device: cpu"
        )
    return choose_device(f"cuda:{local_rank}", "train.device")


def _join(device: torch.device, timeout_s: float, size: int) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        first = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"the {size} processes of this run did not find each other within {timeout_s:.0f} s "
            f"(MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}): {first}"
        ) from error


def _is_first_to_tell() -> bool:
    """Whether no other process has told an error; True, too, where nobody can be asked.

    The first process may keep the account of it (under torchrun its agent does), so it waits for the others to ask.
    """
    try:
        store = dist.distributed_c10d._get_default_store()
        is_first = bool(store.add(_TOLD, 1) == 1)
        deadline = time.monotonic() + _LINGER_S
        while dist.get_rank() == 0 and store.add(_TOLD, 0) < dist.get_world_size() and time.monotonic() < deadline:
            time.sleep(0.05)
    except (RuntimeError, ValueError):  # the process that kept it is gone
        return True
    return is_first
