"""Where a number comes from: date, command, package versions, hardware, and the state of the sources.

Every run folder, result and benchmark report takes these from here, so all name the same things in the same words.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("ultrafuser", "torch", "transformers", "tokenizers", "safetensors", "numpy")
# What else may change how training goes; named where it is installed.
TRAINING_PACKAGES = ("peft", "accelerate", "datasets", "pydantic", "liger-kernel", "triton")


def describe_run() -> dict[str, Any]:
    """When this is asked, what was called, and on what. Goes into every report of a benchmark.

    Returns:
        `date` (ISO 8601, UTC), `command` (as a shell takes it, with the environment's OMP_NUM_THREADS), `hardware`,
        `versions`, and `git` of the working directory (None: not under git).
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "hardware": hardware(),
        "versions": versions(),
        "git": git_state(Path.cwd()),
    }


def command() -> str:
    """The command line of this process, ready to paste."""
    threads = os.environ.get("OMP_NUM_THREADS")
    program = Path(sys.argv[0]).name if Path(sys.argv[0]).is_absolute() else sys.argv[0]
    line = shlex.join([*(["python"] if program.endswith(".py") else []), program, *sys.argv[1:]])
    return f"OMP_NUM_THREADS={threads} {line}" if threads else line


def versions(optional: Sequence[str] = ()) -> dict[str, str]:
    """Versions of Python and of the packages that decide results; of the optional ones, those that are installed."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *optional):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            if package not in optional:
                found[package] = "not installed"
    return found


def hardware() -> dict[str, str | int | float]:
    """Processor, cores, memory, accelerator."""
    description: dict[str, str | int | float] = {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        description["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    if torch.cuda.is_available():
        description["accelerator"] = torch.cuda.get_device_name()
        description["accelerators"] = torch.cuda.device_count()
    return description


def git_state(folder: Path) -> dict[str, str | bool] | None:
    """Commit of the repository that holds a folder, and whether its tracked files differ from it (`dirty`).

    Returns:
        None where there is no git, no repository or no commit.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changes is None else {"commit": commit.strip(), "dirty": bool(changes.strip())}


def _git(folder: Path, *arguments: str) -> str | None:
    # Reading alone: `status` would else take a lock to refresh the index, which another git may be waiting for.
    call = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"
