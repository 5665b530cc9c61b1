"""Run functions somebody else wrote, many in one short-lived child process, each alone and within limits.

The child forks once per function, so one that hangs, eats memory or dies loses only itself. What a function may be
made of is checked before it runs (`sandbox_child.py`); the operating system's limits stand behind that.

Why not `ultrafuser.sandbox`: the demo must run on macOS, too, in containers that allow no lock, and without the extra
`eval` that brings libseccomp. There that sandbox refuses, as it must for benchmarks, whose answers may be any code. The
demo's questions need a few dozen methods and builtins, so a list of what is allowed holds them all: what a model writes
beyond it is wrong anyway, and never runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WALL_LIMIT_S = 2.0  # for one function; a right one takes milliseconds
START_LIMIT_S = 20.0  # for the child itself, on a busy machine

_CHILD = Path(__file__).with_name("sandbox_child.py")


@dataclass(frozen=True, slots=True)
class Call:
    """Source text, the function in it to call, and the arguments to call it with, as Python literals."""

    source: str
    function: str
    arguments: tuple[str, ...]


def run_functions(calls: Sequence[Call]) -> list[list[str] | None]:
    """Call each function on each of its arguments.

    Returns:
        For each call the ``repr`` of its results in order; None if it was refused, failed or broke a limit.
    """
    if not calls:
        return []
    request = json.dumps([(call.source, call.function, call.arguments, WALL_LIMIT_S) for call in calls])
    # -I -S: neither the environment, nor the folder of the script, nor site-packages can be imported from.
    # -W ignore: Python would warn about odd code ("3 (4)") on the user's terminal.
    process = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "ignore", str(_CHILD)],
        input=request.encode(),
        stdout=subprocess.PIPE,
        env={},
        cwd="/",
        timeout=START_LIMIT_S + WALL_LIMIT_S * len(calls),
        check=True,
    )
    replies: list[list[str] | None] = json.loads(process.stdout)
    assert len(replies) == len(calls)
    return replies
