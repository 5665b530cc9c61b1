"""TensorBoard: event files in the folder of the phase."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ultrafuser.train.tracking.phase import TrackedPhase


class BoardFiles:
    """TensorBoard's files in `tensorboard/`; steps done again after a resume replace the old ones.

    Args:
        phase: What is tracked.

    Raises:
        OSError: The folder cannot be written.
    """

    def __init__(self, phase: TrackedPhase) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = phase.resume_step + 1 if phase.resume_step else None
        self._writer: Any = SummaryWriter(str(phase.folder / "tensorboard"), purge_step=purge)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """One scalar a number."""
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        """Flush and close the files."""
        self._writer.close()
