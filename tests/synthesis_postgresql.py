"""A PostgreSQL of its own, in a folder that is thrown away, where Debian's package is installed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


def programs() -> Path | None:
    """Where `initdb` and `pg_ctl` are; None: PostgreSQL is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    path = shutil.which("initdb")
    return Path(path).resolve().parent if path else None


@contextlib.contextmanager
def serving_postgresql() -> Iterator[str]:
    """A server that listens on a socket in its folder alone; gives an SQLAlchemy URL of an empty database."""
    bin_folder = programs()
    assert bin_folder is not None
    user = "postgres" if os.getuid() == 0 else None  # it refuses to run as root
    with tempfile.TemporaryDirectory(prefix="pg-", ignore_cleanup_errors=True) as folder:
        data = Path(folder) / "data"
        if user is not None:
            shutil.chown(folder, user)

        def call(name: str, *arguments: str) -> None:
            command = [str(bin_folder / name), "-D", str(data), *arguments]
            with open(Path(folder) / "log.txt", "a") as log:  # noqa: PTH123 - no pipe that the server would inherit
                subprocess.run(command, user=user, check=True, stdout=log, stderr=log, cwd="/")

        call("initdb", "--auth=trust", "--username=postgres", "--no-sync")
        call("pg_ctl", "-w", "-o", f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off", "start")
        try:
            yield f"postgresql+psycopg://postgres@/postgres?host={folder}"
        finally:
            call("pg_ctl", "-w", "-m", "immediate", "stop")
