"""`environment.json` of a run folder: on what, with what and how each start of the run was made."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from ultrafuser.errors import DataError
from ultrafuser.files import write_text_atomically
from ultrafuser.provenance import TRAINING_PACKAGES, describe_run, git_state, versions

ENVIRONMENT = "environment.json"


def note_start(folder: Path, *, recipe_file: Path | None = None, num_processes: int = 1) -> None:
    """Add this start to those noted in a run folder; a run that was stopped and goes on has several.

    Args:
        folder: Of the run.
        recipe_file: Where the recipe was read; its folder's git state is noted, else the working directory's.
        num_processes: Of the run.

    Raises:
        DataError: What is there is no list of starts, or the file cannot be written.
    """
    path = folder / ENVIRONMENT
    starts: list[dict[str, Any]] = []
    if path.exists():
        try:
            starts = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(starts, list):
                raise ValueError(type(starts).__name__)  # noqa: TRY004  told below, as what is no JSON at all
        except ValueError as error:
            raise DataError(f"{path} is no list of starts ({error}): move it away") from error
    write_text_atomically(json.dumps([*starts, describe_start(recipe_file, num_processes)], indent=1) + "\n", path)


def describe_start(recipe_file: Path | None = None, num_processes: int = 1) -> dict[str, Any]:
    """What is noted of a start: `describe_run` with the training packages, devices, and both git states.

    Returns:
        `git` has `recipe` (the recipe's folder) and `package` (the sources of this package), each None where that is
        not under git.
    """
    start = describe_run()
    return {
        **start,
        "host": platform.node(),
        "platform": platform.platform(),
        "working_directory": str(Path.cwd()),
        "recipe": str(recipe_file) if recipe_file is not None else None,
        "processes": num_processes,
        "versions": versions(TRAINING_PACKAGES),
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] or ["cpu"],
        "cuda": torch.version.cuda,
        "git": {
            "recipe": git_state(recipe_file.resolve().parent if recipe_file is not None else Path.cwd()),
            "package": git_state(Path(__file__).parent),
        },
    }
