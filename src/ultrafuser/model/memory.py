"""Memory in numbers: the most held since a moment, of the accelerator or else of this process; what a machine has."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path

import torch

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def gib(num_bytes: int) -> str:
    """Bytes for people: GiB, or smaller units for small things."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes:,.0f} B"


def machine_bytes() -> int:
    """RAM of this machine; a container's limit counts as its memory."""
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in CGROUP_LIMITS:
        if file.is_file() and (text := file.read_text(encoding="ascii").strip()).isdigit():
            ram = min(ram, int(text))
    return ram


def reset_peak(device: torch.device | None = None) -> None:
    """Begin to measure anew, with what earlier models left behind given back first.

    A process's own peak can be reset on Linux alone; elsewhere it is the peak since the process began.

    Args:
        device: Where the models run; None: not here.
    """
    gc.collect()
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc keeps freed pages for later
            trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:  # some containers forbid it: the peak is then the process's
            return


def peak_bytes(device: torch.device | None = None) -> int:
    """The most bytes held since `reset_peak`: of tensors on a GPU, else of the whole process, torch itself included."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not on this system
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
