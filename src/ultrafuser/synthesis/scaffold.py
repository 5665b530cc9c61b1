"""A new domain to edit: a copy of one that comes with the package, with every prompt that it uses."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ultrafuser.errors import ConfigError, DataError
from ultrafuser.synthesis.domain import SHARED, SHIPPED, shipped_domains

_NAME = re.compile(r"[a-z][a-z0-9_]*")


def new_domain(name: str, *, like: str, to: Path) -> Path:
    """Copy a domain's folder, prompts it shares with others included, as `to/name`.

    Args:
        name: Of the new domain: small letters, digits and underscores.
        like: A domain that comes with the package.
        to: The folder that gets it.

    Raises:
        ConfigError: The name is none, or `like` is no domain.
        DataError: The folder is there already, or cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name of a domain: small letters, digits and underscores, a letter first")
    if like not in shipped_domains():
        raise ConfigError(f"no domain {like!r} comes with the package: choose from {', '.join(shipped_domains())}")
    folder = to / name
    try:
        folder.mkdir(parents=True)
        own = SHIPPED / like
        for path in [*SHARED.glob("*.md"), *own.glob("*.md"), own / "domain.yaml"]:  # its own over what it shares
            shutil.copyfile(path, folder / path.name)
    except FileExistsError:
        raise DataError(f"{folder} is there already: choose another name or folder") from None
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}. Choose another place") from error
    return folder
