"""uvicorn with our connections: the first signal drains, the second ends at once."""

from __future__ import annotations

import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ultrafuser.server.connection import Connection


class Server(uvicorn.Server):
    """Runs an application.

    Args:
        app: From `create_app`.
        ready: Called when the server answers.
    """

    def __init__(self, app: FastAPI, ready: Callable[[], None] = lambda: None) -> None:
        self.app, self.ready = app, ready
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # nobody is believed about where a request comes from
                h11_max_incomplete_event_size=app.state.settings.limits.header_bytes,
                timeout_graceful_shutdown=max(1, round(app.state.settings.deadlines.drain_s)),
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets)
        if self.started:
            self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came. It is not raised again at the end: ending is what it asked for."""
        del sig, frame
        if self.should_exit:
            self.force_exit = True
        self.should_exit = self.app.state.draining = True
