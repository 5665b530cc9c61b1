"""Weights & Biases: one run a phase, grouped by recipe, the same run after a resume.

Where it goes is wandb's own affair: WANDB_MODE=offline keeps it on this disk, WANDB_PROJECT and WANDB_ENTITY say where
it belongs. Nothing but numbers and the resolved recipe is sent: no source code, console output or reports of errors.
"""

from __future__ import annotations

import netrc
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ultrafuser.errors import ConfigError
from ultrafuser.train.tracking.phase import PROJECT, TrackedPhase

_ERROR_REPORTS = "WANDB_ERROR_REPORTING"  # telemetry of the package itself; whoever wants it sets it


class WandbRun:
    """A run of wandb. Steps that were logged before are left as they are by wandb, which takes none twice.

    Args:
        phase: What is tracked; its folder takes `wandb/`.

    Raises:
        wandb.errors.Error: No run can be begun.
    """

    def __init__(self, phase: TrackedPhase) -> None:
        wandb = _import()
        settings = wandb.Settings(
            silent=True,
            console="off",
            save_code=False,
            disable_code=True,
            disable_git=True,  # environment.json has it
            disable_job_creation=True,
        )
        self._run: Any = wandb.init(
            id=phase.id_for("wandb"),
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=phase.run,
            name=phase.title,
            job_type=phase.name,
            dir=str(phase.folder),
            config=dict(phase.config),
            reinit="finish_previous",
            settings=settings,
        )
        if url := self._run.url:
            print(f"wandb: {url}", file=sys.stderr)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Hand the numbers to wandb, which sends them in its own time."""
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Wait until all is written or sent."""
        self._run.finish()


def check_login() -> None:
    """wandb must know who sends, or be told not to: else it would ask in the middle of a run.

    Raises:
        ConfigError: Neither.
    """
    settings = _import().setup().settings
    if settings.mode in ("offline", "disabled", "dryrun") or settings.api_key or settings.identity_token_file:
        return
    host = urlsplit(settings.base_url).hostname or ""
    try:
        if netrc.netrc(os.environ.get("NETRC") or str(Path("~/.netrc").expanduser())).authenticators(host):
            return
    except (OSError, netrc.NetrcParseError):
        pass  # nobody is logged in there, which is what is to be said
    raise ConfigError(
        f"train.trackers names wandb, but nobody is logged in to {host}: run wandb login, or set WANDB_MODE=offline to "
        "keep its runs on this disk"
    )


def _import() -> Any:
    os.environ.setdefault(_ERROR_REPORTS, "false")
    import wandb

    return wandb
