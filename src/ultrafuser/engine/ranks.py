"""Processes that answer together, one for each specialist: messages from the first, one sum back, and who is gone.

Messages are JSON over gloo, from the first process to each of the others, so one that hangs does not hold up a message
to the next. Results come back as a sum that only the first process gets: over gloo, or over NCCL between GPUs.

A wait for one process that ends in vain breaks gloo's connections to all of a group. So the first process waits for
messages only when the sum has come, which shows that all have read them, and asks all who is left before it waits for
one.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultrafuser.engine.memory import is_out_of_memory
from ultrafuser.errors import ConfigError, ModelError

_FIRST_BYTES = 4096  # what nearly all messages fit into; the rest of a longer one follows by itself
_LENGTH_BYTES = 8
_FOREVER = timedelta(days=365)  # others wait for work as long as nobody asks anything
_REPLY_S = 5.0  # within which a process that lives answers the last message
_FAILED, _OUT_OF_MEMORY = 1.0, 2.0


class Ranks:
    """What one process knows of all.

    Args:
        names: Specialists, in the order of the ranks.
        device: Of this rank's specialist.
        timeout_s: Longest wait for the others' results.

    Raises:
        ConfigError: The processes are not as many as the specialists.
    """

    def __init__(self, names: Sequence[str], device: torch.device, *, timeout_s: float) -> None:
        if dist.get_world_size() != len(names):
            raise ConfigError(
                f"there are {dist.get_world_size()} processes for {len(names)} specialists "
                f"({', '.join(names)}): start one for each, --nproc-per-node {len(names)}"
            )
        self.names, self.device = list(names), device
        self.rank = dist.get_rank()
        self._timeout_s = timeout_s
        self.failure: str | None = None
        self.num_collectives = self.num_messages = 0
        self._sent: list[tuple[dist.Work, Tensor]] = []  # messages under way, and their bytes
        self._control = dist.new_group(backend="gloo", timeout=_FOREVER)
        backend = "nccl" if device.type == "cuda" else "gloo"
        self._data = dist.new_group(backend=backend, timeout=timedelta(seconds=timeout_s))

    def agree(self, mine: dict[str, Any], error: Exception | None = None) -> list[dict[str, Any]]:
        """Exchange what each rank has found while it loads; where one has failed, all end.

        Raises:
            ModelError: One failed, or is gone.
        """
        everybody: list[Any] = [None] * len(self.names)
        try:
            dist.all_gather_object(everybody, {**mine, "error": str(error) if error is not None else None})
        except RuntimeError as lost:
            raise ModelError(f"a process ended while the specialists were loaded: {_one_line(lost)}") from lost
        if error is not None:
            raise error
        for rank, found in enumerate(everybody):
            if found["error"] is not None:
                raise ModelError(f"{self._who(rank)} could not be loaded: {found['error']}")
        return everybody

    def send(self, message: dict[str, Any]) -> None:
        """Tell all others what to do; from the first rank.

        Raises:
            ModelError: Somebody is gone, now or before.
        """
        if self.failure is not None:
            raise ModelError(self.failure)
        try:
            content = _encode(message)
            for rank in range(1, len(self.names)):
                self._sent += self._post(content, rank)
        except RuntimeError as error:
            raise self._lost(error) from error
        self.num_messages += 1

    def receive(self) -> dict[str, Any]:
        """Wait for the next message.

        Raises:
            ModelError: The first rank is gone.
        """
        try:
            return self._read(0)
        except RuntimeError as error:
            raise ModelError(f"{self._who(0)} is gone: {_one_line(error)}") from error

    def collect(self, part: Tensor, failure: Exception | None = None) -> Tensor | None:
        """Add up the parts of all ranks; the sum is the first one's.

        Args:
            part: Of this rank, fp32; on failure any of that shape.
            failure: Why this rank has nothing to add. All go on; the first raises.

        Raises:
            ModelError: Somebody is gone, or failed; on any rank, since nothing can go on.
            OutOfMemoryError: Somebody has too little memory for this; all can go on with less.
        """
        flags = torch.zeros(len(self.names), device=part.device)
        if failure is not None:
            flags[self.rank] = _OUT_OF_MEMORY if is_out_of_memory(failure) else _FAILED
        total = torch.cat([part.flatten(), flags])
        try:
            dist.reduce(total, dst=0, group=self._data)
            flags = total[-len(self.names) :].cpu()
        except RuntimeError as error:
            raise self._lost(error) from error
        self.num_collectives += 1
        if self.rank > 0:
            if failure is not None:
                self._write({"failure": f"{type(failure).__name__}: {_one_line(failure)}"}, 0, self._timeout_s)
            return None
        try:
            for work, _ in self._sent:
                work.wait(timedelta(seconds=self._timeout_s))
            self._sent.clear()
            flagged = [rank for rank in range(1, len(self.names)) if flags[rank] > 0]
            reports = {rank: self._read(rank, self._timeout_s)["failure"] for rank in flagged}
        except RuntimeError as error:
            raise self._lost(error) from error
        if failure is not None:
            raise failure
        for rank, text in reports.items():
            if flags[rank] == _OUT_OF_MEMORY:
                raise torch.OutOfMemoryError(f"{self._who(rank)}: {text}")
            self.close(reason := f"{self._who(rank)} failed: {text}")
            self.failure = reason
            raise ModelError(reason)
        return total[: -len(self.names)].view_as(part)

    def close(self, failure: str | None = None) -> list[int]:
        """Let all others end, because of a failure or because the work is done; from the first rank, once.

        Returns:
            Ranks that did not answer.
        """
        if self.failure is not None:
            return []
        self.failure = "the engine was closed"
        others, content = range(1, len(self.names)), _encode({"end": failure})
        replies: dict[int, tuple[dist.Work, Tensor]] = {}
        for rank in others:
            with contextlib.suppress(RuntimeError):  # its connection is broken: it does not answer
                self._sent += self._post(content, rank)
                replies[rank] = self._expect(_FIRST_BYTES, rank)
        deadline = time.monotonic() + _REPLY_S
        return [rank for rank in others if rank not in replies or not _has_come(replies[rank][0], deadline)]

    def say_goodbye(self) -> None:
        """Answer the last message; the first rank then knows that this one lives."""
        with contextlib.suppress(RuntimeError):  # which is gone itself, then
            self._write({"goodbye": self.rank}, 0, _REPLY_S)

    def _lost(self, error: Exception) -> ModelError:
        """After a broken connection or a timeout: find out who is gone."""
        if self.rank > 0:
            return ModelError(f"another process is gone: {_one_line(error)}")
        silent = self.close("a process is gone")
        who = " and ".join(map(self._who, silent)) or "a process"
        self.failure = f"{who} is gone or hangs, so the model cannot answer: start it again ({_one_line(error)})"
        return ModelError(self.failure)

    def _who(self, rank: int) -> str:
        return f"rank {rank} with specialist {self.names[rank]!r}"

    def _write(self, message: dict[str, Any], rank: int, timeout_s: float) -> None:
        for work, _ in self._post(_encode(message), rank):
            work.wait(timedelta(seconds=timeout_s))

    def _post(self, content: Sequence[Tensor], rank: int) -> list[tuple[dist.Work, Tensor]]:
        """Begin to send; the bytes must live until it has ended."""
        posted = [(dist.isend(part, dst=rank, group=self._control), part) for part in content]
        return [(work, part) for work, part in posted if work is not None]

    def _expect(self, size: int, rank: int) -> tuple[dist.Work, Tensor]:
        """Begin to receive; the bytes are there when it has ended."""
        buffer = torch.empty(size, dtype=torch.uint8)
        work = dist.irecv(buffer, src=rank, group=self._control)
        assert work is not None
        return work, buffer

    def _read(self, rank: int, timeout_s: float | None = None) -> dict[str, Any]:
        content = self._read_bytes(_FIRST_BYTES, rank, timeout_s)
        length = int.from_bytes(content[:_LENGTH_BYTES], "big") + _LENGTH_BYTES
        if length > _FIRST_BYTES:
            content += self._read_bytes(length - _FIRST_BYTES, rank, timeout_s)
        message: dict[str, Any] = json.loads(content[_LENGTH_BYTES:length])
        return message

    def _read_bytes(self, size: int, rank: int, timeout_s: float | None) -> bytes:
        work, buffer = self._expect(size, rank)
        work.wait(timedelta(seconds=timeout_s) if timeout_s is not None else _FOREVER)
        return bytes(buffer.numpy())


def _has_come(work: dist.Work, deadline: float) -> bool:
    """Whether something ends before a moment of the monotonic clock; what has ended already counts after it, too."""
    try:
        work.wait(timedelta(seconds=max(deadline - time.monotonic(), 1e-3)))
    except RuntimeError:
        return False
    return True


def _encode(message: dict[str, Any]) -> list[Tensor]:
    """A message's bytes, their number first, as one or two tensors."""
    content = json.dumps(message).encode()
    content = len(content).to_bytes(_LENGTH_BYTES, "big") + content
    parts = [content[:_FIRST_BYTES].ljust(_FIRST_BYTES), content[_FIRST_BYTES:]]
    return [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts if part]


def join_ranks(timeout_s: float) -> bool:
    """Join the processes that the launcher started, once.

    Args:
        timeout_s: For what they do together while they load.

    Returns:
        Whether this call did it.

    Raises:
        ConfigError: No launcher started this process.
    """
    if dist.is_initialized():
        return False
    if "RANK" not in os.environ:
        raise ConfigError(
            "specialists in parallel need one process each: python -m torch.distributed.run --nproc-per-node N -m ..."
        )
    # Without it a lost peer ends the process from within NCCL, and nobody can say why.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    return True


def _one_line(error: Exception) -> str:
    # What gloo adds for developers is left out.
    return " ".join(str(error).split(" This is typically")[0].split())[:300]
