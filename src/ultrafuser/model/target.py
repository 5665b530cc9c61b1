"""What a folder may be written over: a model that stood there, and nothing that would be lost with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

from ultrafuser.errors import ConfigError, ModelError
from ultrafuser.model.configuration import FusedConfig

# Within a fused model: its own, what `ultrafuser inspect` said of the one that is replaced, notes of a download.
OWN_FOLDERS = {"adapters", "inspection", ".cache"}


def check_model_target(folder: Path) -> None:
    """Refuse a folder that holds something else than a fused model.

    Raises:
        ModelError: Names the first thing that would be lost.
    """
    is_fused = _is_fused(folder)
    for path in _entries(folder):
        if not is_fused or (path.is_dir() and path.name not in OWN_FOLDERS):
            _refuse(folder, path, "a fused model")


def check_export_target(folder: Path, model: str) -> None:
    """Refuse a folder for what is made of a model: something else than a fused model, or that model itself.

    Raises:
        ConfigError: The model would be replaced by what is made of it.
        ModelError: As `check_model_target`.
    """
    check_model_target(folder)
    if folder.resolve() == Path(model).resolve():
        raise ConfigError(f"{folder} is the model itself, which would be lost: choose another folder")


def check_adapters_target(folder: Path) -> None:
    """Refuse a folder that holds something else than folders of adapters.

    Raises:
        ModelError: Names the first thing that would be lost.
    """
    for path in _entries(folder):
        if not (path / "adapter_config.json").is_file():
            _refuse(folder, path, "a set of adapters")


def _entries(folder: Path) -> list[Path]:
    """What stands in a folder, or where it should be."""
    if folder.is_dir():
        return sorted(folder.iterdir())
    return [folder] if folder.exists() else []


def _refuse(folder: Path, path: Path, what: str) -> NoReturn:
    raise ModelError(
        f"{folder} would be replaced as a whole, but {path} is no part of {what}: choose another folder, or move it"
    )


def _is_fused(folder: Path) -> bool:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("model_type") == FusedConfig.model_type
