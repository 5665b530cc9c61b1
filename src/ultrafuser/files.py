"""Files and folders written so that a reader sees the old one or the new one, never half of one; JSON read checked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from ultrafuser.errors import DataError

Content = TypeVar("Content", bound=BaseModel)


def read_json(path: Path, kind: type[Content], *, what: str) -> Content:
    """Read a JSON file as a pydantic model.

    Args:
        path: The file.
        kind: The model.
        what: The file as it should be, for the message: "evaluation of this version".

    Raises:
        DataError: The file is missing, or is none; names the first field that is wrong.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"{path} is no {what}: {place}: {first['msg']}") from error


def write_text_atomically(text: str, path: Path) -> None:
    """Write UTF-8 text under a temporary name beside `path`, flush it to the disk, then rename.

    Args:
        text: All of the file.
        path: Where it goes; missing folders are made.

    Raises:
        DataError: The file cannot be written (full disk, no permission); what was at `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}. Free space or choose another place."
        ) from error


def put_in_place(partial: Path, target: Path) -> None:
    """Give a finished folder its name, in the place of an older one: a crash leaves one of the two whole.

    All of it is flushed to the disk first, so that not even a power cut leaves half of it there. Raises OSError.
    """
    for path in (*(path for path in partial.rglob("*") if path.is_file()), partial):
        _flush(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    _flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened, and the rename is durable without it
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
