"""Mathematics: is this answer equal to that one? math-verify decides, in a process of its own that may be killed.

sympy can be made to compute for ever or to eat all memory, and Python's signals do not interrupt it; so the worker has
a memory limit and its parent a clock. Plain numbers are compared here, exactly, without the worker.
"""

from __future__ import annotations

import atexit
import json
import selectors
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from ultrafuser.data.conclusions import conclusion, plain_number
from ultrafuser.errors import ConfigError, DataError

DEADLINE_S = 5.0  # for one answer; a usual one takes milliseconds
START_LIMIT_S = 60.0  # for the worker to load sympy on a busy machine
UNLIKELY = 7919  # added to a right answer, it must make it wrong: a checker that finds all equal is none
RECYCLE_AFTER = 500  # answers, since sympy's caches grow

_WORKER = Path(__file__).with_name("math_worker.py")

Outcome = Literal["right", "wrong", "unparsed", "timeout"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of an answer: the piece taken for it, and whether that equals the right one."""

    outcome: Outcome
    extracted: str | None


class MathGrader:
    """Compares answers with right ones, in a worker that is started when first needed.

    Args:
        deadline_s: After so long the worker is killed and the answer is wrong, with outcome "timeout".

    Raises:
        ConfigError: math-verify is not installed (raised by `grade`).
    """

    def __init__(self, *, deadline_s: float = DEADLINE_S) -> None:
        self.deadline_s = deadline_s
        self._worker: subprocess.Popen[bytes] | None = None
        self._num_asked = 0
        self._readable: set[str] = set()

    def grade(self, gold: str, answer: str) -> Verdict:
        """Grade a worked solution by what it concludes.

        Args:
            gold: The right answer, a number or LaTeX.
            answer: All that the model wrote.
        """
        extracted = conclusion(answer)
        if extracted is None:
            return Verdict("unparsed", None)
        first, second = plain_number(gold), plain_number(extracted)
        if first is not None and second is not None:
            return Verdict("right" if first == second else "wrong", extracted)
        return Verdict(self._ask(gold, extracted), extracted)

    def check_golds(self, golds: Sequence[str]) -> None:
        """Refuse right answers that the grader cannot read: each must equal itself, and not itself plus a number.

        Raises:
            DataError: One does not, or does; says which.
        """
        for gold in golds:
            if plain_number(gold) is None and gold not in self._readable:
                if self._ask(gold, gold) != "right" or self._ask(gold, f"{gold}+{UNLIKELY}") == "right":
                    raise DataError(f"the right answer {gold!r:.200} cannot be read by math-verify: leave it out")
                self._readable.add(gold)

    def close(self) -> None:
        """Stop the worker."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None

    def _ask(self, gold: str, answer: str) -> Outcome:
        if self._num_asked >= RECYCLE_AFTER:
            self.close()
        worker = self._worker or self._start()
        assert worker.stdin is not None
        self._num_asked += 1
        worker.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
        worker.stdin.flush()
        reply = self._read(self.deadline_s)
        if reply is None:
            self.close()
            return "timeout"
        outcome: Outcome = json.loads(reply)
        return outcome

    def _start(self) -> subprocess.Popen[bytes]:
        # -I: neither the environment nor the current folder decides what is imported.
        self._worker = subprocess.Popen(
            [sys.executable, "-I", str(_WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._num_asked = 0
        if self._read(START_LIMIT_S) is None:
            worker, self._worker = self._worker, None
            worker.kill()
            reason = worker.communicate()[1].decode(errors="replace").strip().rpartition("\n")[2]
            raise ConfigError(
                f"the checker of mathematics does not start ({reason or 'too slow'}): pip install 'ultrafuser[eval]'"
            )
        return self._worker

    def _read(self, limit_s: float) -> bytes | None:
        """A line of the worker; None if it takes too long or dies."""
        assert self._worker is not None
        assert self._worker.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._worker.stdout, selectors.EVENT_READ)
            if not selector.select(timeout=limit_s):
                return None
        return self._worker.stdout.readline() or None


@cache
def shared_grader() -> MathGrader:
    """The grader that all tasks of this process share; its worker ends with the process."""
    grader = MathGrader()
    atexit.register(grader.close)
    return grader
