"""A process of its own for what a test runs, forked from one that has everything imported."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def fork(action: Callable[[], object], output: Path | None = None) -> int:
    """Start a child that does something and ends; its process id.

    Its exit code is 1 where something was raised, which it prints. What it prints goes to the file `output`, if any.
    """
    if child := os.fork():
        return child
    code = 1
    try:
        if output is not None:
            file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(file, 1)
            os.dup2(file, 2)
        action()
        code = 0
    except BaseException:  # nothing of the parent's may run in the child
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
