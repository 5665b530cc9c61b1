"""trackio: one run a phase, grouped by recipe, in its database on this disk.

TRACKIO_DIR says where that is. It stays here unless the user sets TRACKIO_SPACE_ID or TRACKIO_SERVER_URL, which are
trackio's own. `trackio show --project ultrafuser` draws the curves.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from ultrafuser.train.tracking.phase import PROJECT, TrackedPhase


class TrackioRun:
    """A run of trackio. It knows runs by name, so the name carries the id kept in the folder of the phase.

    trackio cannot take back what it has: steps done again after a crash stand there twice, with the same numbers.

    Args:
        phase: What is tracked.
    """

    def __init__(self, phase: TrackedPhase) -> None:
        import trackio

        with contextlib.redirect_stdout(sys.stderr):  # it talks; stdout is for results
            self._run: Any = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=f"{phase.title}-{phase.id_for('trackio')}",
                group=phase.run,
                config=dict(phase.config),
                resume="allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Hand the numbers to trackio, which writes them in its own time."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Wait until all is written."""
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()
