"""One process for each SQLite database: a lock file says who.

The lock is the operating system's, so a process that is killed holds it no longer, whatever the file says.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path

from ultrafuser.errors import SynthesisError


class RunLock:
    """Held from `acquire` to `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            SynthesisError: Another process (or this one, elsewhere) holds it, or the file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise SynthesisError(
                f"cannot write {self.path}: {error.strerror or error}. Free space or choose another folder."
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode("utf-8", "replace").strip() or "another process"
            os.close(descriptor)
            raise SynthesisError(
                f"{self.path.with_suffix('')} is in use by {holder}: wait until it ends, or stop it; "
                "several workers want a PostgreSQL (database: in the recipe)"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise SynthesisError(
                f"cannot lock {self.path}: {error.strerror or error}. Choose a folder on a disk of this machine."
            ) from None
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {started}\n".encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Let the next one in; the file stays, for removing it would let two in."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
