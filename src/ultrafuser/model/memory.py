"""The most memory held since a moment: of the accelerator, or else of this process."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch


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
