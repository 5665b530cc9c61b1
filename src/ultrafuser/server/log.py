"""The server's log: one JSON object a line, with control characters escaped and nothing of what was said."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any, TextIO

LOGGER = logging.getLogger("ultrafuser.server")
_OTHERS = ("uvicorn.error", "asyncio")  # their warnings go the same way
_dropped = 0


def log_to(stream: TextIO) -> None:
    """Write the log of this process to a stream, in place of whatever was set up before."""
    handler = _Lines(stream)
    handler.setFormatter(_JsonFormatter())
    for logger, level in ((LOGGER, logging.INFO), *((logging.getLogger(name), logging.WARNING) for name in _OTHERS)):
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level)


def log(event: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Write a line. `fields` must hold nothing of prompts or answers."""
    LOGGER.log(level, event, extra={"fields": fields})


def log_bug(error: BaseException, **fields: Any) -> None:
    """Write where a bug happened. Its message is left out: it may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    where = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
    log("bug", level=logging.ERROR, error=type(error).__name__, where=where, **fields)


def num_dropped_lines() -> int:
    """Lines that could not be written since the process began."""
    return _dropped


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        return json.dumps(line, default=str)  # ASCII: control characters of any kind come out escaped


class _Lines(logging.StreamHandler[TextIO]):
    """A full disk must not stop the server: lines that cannot be written are counted."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        global _dropped
        _dropped += 1
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
