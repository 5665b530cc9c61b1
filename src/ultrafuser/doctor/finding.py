"""A finding: one thing the doctor looked at, whether it is well, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "blocker"]
LEVELS: tuple[Level, ...] = ("blocker", "warning", "ok")  # the worst first


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        level: "blocker": building or training would fail; "warning": it works, but perhaps not as meant, or could not
            be checked here; "ok".
        subject: What was looked at, such as "code" (a specialist) or "vocabulary".
        what: What is the case, with the value.
        do: What to do about it; empty when there is nothing to do.
    """

    level: Level
    subject: str
    what: str
    do: str = ""


def ok(subject: str, what: str, do: str = "") -> Finding:
    """All is well, or worth knowing at most."""
    return Finding("ok", subject, what, do)


def warning(subject: str, what: str, do: str) -> Finding:
    """It works, but perhaps not as meant; or it could not be checked here."""
    return Finding("warning", subject, what, do)


def blocker(subject: str, what: str, do: str) -> Finding:
    """Building or training would fail."""
    return Finding("blocker", subject, what, do)
