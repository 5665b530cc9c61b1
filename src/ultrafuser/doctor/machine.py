"""The machine: memory, processors and disk that a run can have."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from ultrafuser.model.memory import machine_bytes


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is, in bytes; `gpu_bytes` of the one GPU that is used, None without one."""

    num_cores: int
    ram_bytes: int
    gpu_bytes: int | None = None
    gpu_name: str | None = None

    @property
    def device(self) -> str:
        """Where training runs unless the recipe says otherwise."""
        return "cpu" if self.gpu_bytes is None else "cuda"


def inspect_machine() -> Machine:
    """Look at this machine; a container's limit counts as its memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not torch.cuda.is_available():
        return Machine(cores, machine_bytes())
    gpu = torch.cuda.get_device_properties(0)
    return Machine(cores, machine_bytes(), int(gpu.total_memory), str(gpu.name))


def free_disk_bytes(folder: Path) -> int:
    """Room on the disk where a folder is, or will be."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free
