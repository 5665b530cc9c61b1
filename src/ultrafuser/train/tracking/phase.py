"""What a tracker is told of a phase, and the id under which it knows it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ultrafuser.files import write_text_atomically

RUNS = "trackers.json"  # in the folder of a phase: under which id each tracker knows it
PROJECT = "ultrafuser"


@dataclass(frozen=True, slots=True)
class TrackedPhase:
    """What a tracker is told of a phase before its first step.

    Attributes:
        run: Name of the recipe; groups the phases.
        name: Of the phase.
        folder: Of the phase.
        resume_step: The step that training goes on with; 0: from the start.
        config: The resolved recipe as plain values.
    """

    run: str
    name: str
    folder: Path
    resume_step: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Of the phase among the runs of all recipes."""
        return f"{self.run}-{self.name}"

    def id_for(self, tracker: str) -> str:
        """The id under which a tracker knows this phase: made once and kept in the folder, so a resume goes on with it.

        Raises:
            DataError: The folder cannot be written.
        """
        path = self.folder / RUNS
        known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if tracker not in known:
            known[tracker] = secrets.token_hex(4)
            write_text_atomically(json.dumps(known, indent=1) + "\n", path)
        return known[tracker]
