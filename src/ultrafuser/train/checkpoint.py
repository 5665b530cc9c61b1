"""Training checkpoints: written whole or not at all, hashed, and passed over when damaged.

A checkpoint is a folder `step-00000100`: safetensors files, `state.json`, and last of all `MANIFEST.json` with the
SHA-256 of every other file. Several processes write a file each (`parallel/checkpoint.py`). It is written under a
temporary name, flushed to disk and renamed, so a crash at any moment leaves either a whole checkpoint or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ultrafuser.errors import CheckpointError
from ultrafuser.files import put_in_place
from ultrafuser.train.parallel.world import World

logger = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
PARAMETERS, OPTIMIZER, STATE = "parameters.safetensors", "optimizer.safetensors", "state.json"
SHARDS = "shard-*.safetensors"  # in the place of the first two, where several processes write


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What training needs to go on: parameters and optimizer state by name, and plain values."""

    step: int
    parameters: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def write_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write a checkpoint and delete all but the newest `keep`.

    Raises:
        CheckpointError: The disk is full or refuses; nothing half-written is left under a checkpoint's name.
    """
    with new_checkpoint(folder, checkpoint.step) as partial:
        save_file(_contiguous(checkpoint.parameters), partial / PARAMETERS)
        save_file(_contiguous(checkpoint.optimizer), partial / OPTIMIZER)
        target = seal(partial, checkpoint, hashes=hash_files(partial, "*"))
    sweep(folder, target, keep=keep)
    return target


@contextlib.contextmanager
def new_checkpoint(folder: Path, step: int) -> Iterator[Path]:
    """An empty folder under a temporary name; what goes wrong while it is filled leaves nothing behind.

    Raises:
        CheckpointError: The disk is full or refuses.
    """
    partial = partial_path(folder, step)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise refusal(folder, step, error) from error


def partial_path(folder: Path, step: int) -> Path:
    """Where a checkpoint lies while it is written."""
    return folder / f".partial-{step:08d}"


def seal(partial: Path, checkpoint: Checkpoint, *, hashes: Mapping[str, str]) -> Path:
    """Add state and manifest to the files of a checkpoint, and give it its name.

    Args:
        partial: The folder.
        checkpoint: Whose step and state.
        hashes: Of the files that are there, by name.
    """
    state = {"step": checkpoint.step, **checkpoint.state}
    (partial / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    hashes = {**hashes, STATE: _hash(partial / STATE)}
    (partial / MANIFEST).write_text(json.dumps(hashes, indent=1), encoding="utf-8")
    target = partial.with_name(f"step-{checkpoint.step:08d}")
    put_in_place(partial, target)
    return target


def sweep(folder: Path, newest: Path, *, keep: int) -> None:
    """Delete all checkpoints but the newest `keep`, and what crashes left behind."""
    # What lies beyond the step just written was passed over as damaged: it must not count among the newest.
    there = list_checkpoints(folder)
    kept = [path for path in there if path.name <= newest.name][-keep:]
    for path in (*(path for path in there if path not in kept), *folder.glob(".partial-*")):
        shutil.rmtree(path, ignore_errors=True)


def refusal(folder: Path, step: int, error: BaseException) -> CheckpointError:
    """What to tell where a checkpoint could not be written."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return CheckpointError(
        f"cannot write the checkpoint of step {step} to {folder}: {reason}. Make room and start again: "
        "training goes on from the newest whole checkpoint"
    )


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first, whether whole or not."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def read_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that passes its hashes, all of it; damaged ones are passed over with a notice."""
    path = find_newest(folder)
    return read_checkpoint(path) if path is not None else None


def find_newest(folder: Path, world: World | None = None) -> Path | None:
    """Where the newest checkpoint is that passes its hashes; damaged ones are passed over with a notice.

    Args:
        folder: Of the checkpoints.
        world: Processes that look together, each at a part of the files; all find the same.
    """
    world = world if world is not None else World()
    there: list[Path] = world.gather(list_checkpoints(folder))[0]
    for path in reversed(there):
        found = world.gather(find_damage(path, part=world.rank, parts=world.size))
        problem = next((problem for problem in found if problem is not None), None)
        if problem is None:
            return path
        if world.is_main:
            logger.warning("checkpoint %s is damaged (%s): going back to the one before", path, problem)
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint with whole tensors, be it written by one process or by several."""
    state = read_state(path)
    if (path / OPTIMIZER).is_file():
        optimizer = load_file(path / OPTIMIZER)
    else:
        optimizer = _join(sorted(path.glob(SHARDS)), slots=True)
    return Checkpoint(state.pop("step"), read_parameters(path), optimizer, state)


def read_parameters(path: Path) -> dict[str, Tensor]:
    """The parameters of a checkpoint, whole, without the optimizer's state."""
    if (path / PARAMETERS).is_file():
        return load_file(path / PARAMETERS)
    return _join(sorted(path.glob(SHARDS)), slots=False)


def read_state(path: Path) -> dict[str, Any]:
    """The plain values of a checkpoint, and its step."""
    state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    return state


def _join(paths: Sequence[Path], *, slots: bool) -> dict[str, Tensor]:
    """Whole tensors of parts that lie in several files; each file's header says where its parts begin.

    Args:
        paths: The files.
        slots: Read the optimizer's state, `<parameter>/<slot>`, or else the parameters.
    """
    parts: dict[str, list[tuple[list[int], Tensor]]] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for name in (name for name in file.keys() if ("/" in name) is slots):  # noqa: SIM118  it is no mapping
                parts.setdefault(name, []).append((places[name]["saved_offsets"], file.get_tensor(name)))
    tensors: dict[str, Tensor] = {}
    for name, pieces in parts.items():
        ends = [[start + size for start, size in zip(at, piece.shape, strict=True)] for at, piece in pieces]
        whole = tensors[name] = pieces[0][1].new_empty([max(sizes) for sizes in zip(*ends, strict=True)])
        for (at, piece), end in zip(pieces, ends, strict=True):
            whole[tuple(map(slice, at, end))] = piece
    return tensors


def find_damage(path: Path, *, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint folder, or None when every file has its recorded hash.

    Args:
        path: The folder.
        part: Which part of the files to read, from 0.
        parts: Of how many; the others are somebody else's.
    """
    manifest = path / MANIFEST
    if not manifest.is_file():
        return f"no {MANIFEST}"
    try:
        hashes: Mapping[str, str] = json.loads(manifest.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return f"{MANIFEST} is unreadable"
    in_shards = any(fnmatch(name, SHARDS) for name in hashes)
    if missing := [name for name in ((STATE,) if in_shards else (PARAMETERS, OPTIMIZER, STATE)) if name not in hashes]:
        return f"{MANIFEST} does not list {missing[0]}"
    for name, expected in list(hashes.items())[part::parts]:
        if not (path / name).is_file():
            return f"{name} is missing"
        if _hash(path / name) != expected:
            return f"{name} has another content than was written"
    return None


def hash_files(folder: Path, pattern: str) -> dict[str, str]:
    """SHA-256 of the files of a folder, by name."""
    return {path.name: _hash(path) for path in sorted(folder.glob(pattern))}


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
