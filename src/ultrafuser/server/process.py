"""The server as a process: everything checked, the model loaded, served until a signal, drained, ended.

What is checked first needs none of the slow imports, so a mistake is told at once.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ultrafuser.errors import ModelError
from ultrafuser.server.keys import KeyRing
from ultrafuser.server.log import log, log_to
from ultrafuser.server.preflight import bind, check_model, check_reach, is_local
from ultrafuser.server.settings import LOCAL_HOSTS, Deadlines, Limits, ServerSettings

if TYPE_CHECKING:
    from ultrafuser.engine.engine import Engine

_CLOSE_S = 5.0  # for the engine's thread to end its step
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What a user says to `ultrafuser serve`.

    Attributes:
        place: Folder or hub id of a model.
        host, port: Where to listen; port 0 takes a free one.
        key_file: Keys, one a line; None looks into the environment.
        without_keys: Others may reach the server, and that is meant.
        name: What clients call the model; empty takes it from the place.
        allowed_hosts: Host headers besides the address itself; empty allows any where others can reach the server.
        max_running, max_waiting: Choices that run at once, and that wait.
        max_context: Tokens of prompt and answer; 0 takes the model's.
        weights, drafts, draft_weights, pack: Of the engine (`EngineOptions`).
        parallel: This process is one of several, a specialist each; the first one serves.
        template, dtype, device: How to load; the template is for a model that is not fused.
        limits, deadlines: Of the server.
    """

    place: str
    host: str = "127.0.0.1"
    port: int = 8000
    key_file: Path | None = None
    without_keys: bool = False
    name: str = ""
    allowed_hosts: tuple[str, ...] = ()
    max_running: int = 16
    max_waiting: int = 256
    max_context: int = 0
    weights: str = "exact"
    drafts: tuple[str, ...] = ("lookup", "self")
    draft_weights: str = "auto"
    pack: bool | None = None
    parallel: bool = False
    template: str = "tokenizer"
    dtype: str = ""
    device: str = ""
    limits: Limits = field(default_factory=Limits)
    deadlines: Deadlines = field(default_factory=Deadlines)


def serve(options: ServeOptions, ready: Callable[[str], None] = print) -> int:
    """Serve a model until a signal.

    Args:
        options: What and how.
        ready: Called with one line when the server answers.

    Returns:
        The exit code: 0 after a drain, 130 when a second signal cut it short.

    Raises:
        ConfigError: The port is taken, or the keys are at fault.
        ModelError: There is no model, it is damaged, or it does not fit.
    """
    if options.parallel and int(os.environ.get("RANK", "0")) > 0:
        _load(options)  # lends its specialist until the first one ends
        return 0
    keys = KeyRing.read(options.key_file)
    check_reach(options.host, keys, without_keys=options.without_keys)
    with bind(options.host, options.port) as listener:
        check_model(options.place, template=options.template)
        engine = _load(options)
        assert engine is not None, "the first process has the engine"
        from ultrafuser.engine.thread import EngineThread
        from ultrafuser.server.app import create_app
        from ultrafuser.server.running import Server

        thread = EngineThread(engine, max_waiting=options.max_waiting)
        settings = _settings(options)
        line = f"{settings.model_name} is served at {_address(listener)}"
        server = Server(create_app(thread, settings, keys), lambda: ready(line))
        log_to(sys.stderr)
        server.run([listener])
    thread.close(_CLOSE_S)
    if options.parallel:
        from ultrafuser.engine.parallel import close_ranks

        close_ranks(engine)
    return _end(aborted=server.force_exit)


def _load(options: ServeOptions) -> Engine | None:
    from transformers.utils.logging import disable_progress_bar

    from ultrafuser.engine.load import load_engine, make_options
    from ultrafuser.model.load import LoadOptions

    disable_progress_bar()  # stderr is for the log, a line for each thing
    try:
        load: Callable[..., Engine | None] = load_engine
        drafts = options.drafts
        if options.parallel:
            from ultrafuser.engine.parallel import run_rank

            load = run_rank
            # A specialist that runs ahead cannot pay where all run at once.
            drafts = tuple(kind for kind in drafts if kind != "self")
        return load(
            options.place,
            make_options(
                max_context=options.max_context,
                max_choices=options.max_running,
                weights=options.weights,
                drafts=drafts,
                draft_weights=options.draft_weights,
                pack=options.pack,
                release_model=True,
            ),
            LoadOptions(options.template, options.dtype, options.device),
        )
    except (MemoryError, OSError, RuntimeError, ValueError) as error:  # of transformers, which has no tree of its own
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, MemoryError) or "memory" in reason:
            reason = "too little memory: serve a smaller model, or lower --max-running or --max-context"
        raise ModelError(f"{options.place} cannot be loaded: {reason}") from error


def _settings(options: ServeOptions) -> ServerSettings:
    hosts = (*LOCAL_HOSTS, options.host.lower(), *(host.lower() for host in options.allowed_hosts))
    anybody = not options.allowed_hosts and not is_local(options.host)
    return ServerSettings(
        model_name=options.name or _short_name(options.place),
        allowed_hosts=("*",) if anybody else hosts,
        limits=options.limits,
        deadlines=options.deadlines,
    )


def _short_name(place: str) -> str:
    """runs/demo/model is the model of the run "demo"."""
    path = Path(place).expanduser()
    path = path.resolve() if path.exists() else path
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _end(*, aborted: bool) -> int:
    code = INTERRUPTED if aborted else 0
    log("stopped", aborted=aborted)
    if any(thread.name == "ultrafuser-engine" for thread in threading.enumerate()):
        # Inside a step that hangs: the interpreter would tear down what it works with.
        sys.stderr.flush()
        os._exit(code or 1)
    return code
