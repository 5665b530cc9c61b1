"""Before anything slow: is the port free, is there a whole model, does it fit into memory? Each refusal is one line."""

from __future__ import annotations

import ipaddress
import json
import os
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ultrafuser.chat.messages import Message
from ultrafuser.chat.template import Template
from ultrafuser.errors import ConfigError, ModelError, TemplateError, UltrafuserError
from ultrafuser.server.keys import VARIABLE, KeyRing

CONFIG = "config.json"
_MARGIN = 1.1  # of the weights' bytes: the rest of the process
_BACKLOG = 2048
_TEMPLATE_S, _TEMPLATE_CHARACTERS = 10.0, 100_000  # of one question: seconds, characters


def bind(host: str, port: int) -> socket.socket:
    """Take the port; 0 takes a free one.

    Raises:
        ConfigError: It is taken, or not ours to take, or there is no such host.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host!r} port {port}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)  # what comes while the model loads waits
    except OSError as error:
        listener.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(f"cannot listen on {host} port {port}: {reason.lower()}; choose another --port") from error
    return listener


def check_reach(host: str, keys: KeyRing, *, without_keys: bool) -> None:
    """A server that others can reach needs keys.

    Raises:
        ConfigError: It has none, and nobody said that this is meant.
    """
    if not keys and not without_keys and not is_local(host):
        raise ConfigError(
            f"{host} can be reached by others and there are no keys: give --api-keys FILE or the variable {VARIABLE}, "
            "or say --without-keys"
        )


def is_local(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_model(place: str, *, template: str = "tokenizer") -> None:
    """Look at a model folder without loading it; a hub id is looked at by the loader.

    Args:
        place: Folder, hub id, or file.
        template: Of a model that is not fused.

    Raises:
        ModelError: Something is missing or damaged, or the weights are larger than the memory.
        TemplateError: A template that came with the model fails, or does not end.
    """
    folder = Path(place).expanduser()
    if not folder.exists():
        if place.startswith((".", "/", "~")) or place.count("/") != 1:
            raise ModelError(f"there is no model at {place}: no such folder")
        return
    if not folder.is_dir():
        return  # a GGUF file
    num_bytes = sum(_check_weights(file) for file in _weight_files(folder))
    have = available_bytes()
    if num_bytes * _MARGIN > have:
        raise ModelError(
            f"too little memory: the weights of {place} take {num_bytes / 2**30:.2f} GiB, {have / 2**30:.2f} GiB "
            "are free: serve a smaller model, or free some"
        )
    for source in _templates(folder, template):
        _try_template(source, place)


def _templates(folder: Path, template: str) -> list[str]:
    """Texts of the templates that came with a model and will be used."""
    config = _read_config(folder)
    if config.get("model_type") == "ultrafuser":
        return [str(part.get("source", "")) for part in config.get("templates") or []]
    if template != "tokenizer":
        return []
    file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    own = _read_json(settings).get("chat_template") if settings.is_file() else None
    return [file.read_text(encoding="utf-8")] if file.is_file() else [own] if isinstance(own, str) else []


def _try_template(source: str, place: str) -> None:
    """A template is a stranger's program: let it write one question, in bounded time."""
    result: list[str | UltrafuserError] = []

    def render() -> None:
        try:
            result.append(Template("of the model", source).render((Message("user", "question"),)))
        except UltrafuserError as error:
            result.append(error)

    thread = threading.Thread(target=render, daemon=True)  # one that does not end does not keep the process
    thread.start()
    thread.join(_TEMPLATE_S)
    if not result:
        raise TemplateError(f"the template of {place} takes longer than {_TEMPLATE_S:g} s for one question")
    if isinstance(result[0], UltrafuserError):
        raise result[0]
    if len(result[0]) > _TEMPLATE_CHARACTERS:
        raise TemplateError(f"the template of {place} writes {len(result[0]):,} characters for one question")


def _weight_files(folder: Path) -> Iterator[Path]:
    """Files with weights: of the folder, or of the folders that a gate-only model refers to."""
    config = _read_config(folder)
    if config.get("gate_only"):
        parts = config.get("sources", [])
        # A place that begins with ./ is in the folder itself; a base that all share is read once.
        places = [
            folder / place if (place := str(part.get("model"))).startswith("./") else Path(place) for part in parts
        ]
        for source in places[: 1 if config.get("shared_base") else None]:
            if source.is_dir():
                yield from _weight_files(source)
        yield from (folder / part["lora"] / "adapter_model.safetensors" for part in parts if part.get("lora"))
        yield folder / "gate.safetensors"
        return
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = _read_json(index).get("weight_map", {})
        yield from (folder / name for name in sorted(set(shards.values())))
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = [file.name for file in sorted(folder.iterdir()) if file.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        only = f" {others[0]} is a pickle, which can run code: convert it." if others else ""
        raise ModelError(f"{folder} has no weights (*.safetensors).{only}")
    yield from files


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} is no model folder: it has no {CONFIG}")
    return _read_json(folder / CONFIG)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds no object")
    return value


def _check_weights(file: Path) -> int:
    """Bytes of a file whose header is sound and which is as long as the header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            return file.stat().st_size
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} is damaged: {error}") from error


def available_bytes() -> int:
    """Memory this process can still have: the machine's, the container's, its own limit, whichever is least."""
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
        limits.append(int(lines["MemAvailable"].split()[0]) * 1024)
    maximum, current = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if maximum.is_file() and (text := maximum.read_text(encoding="ascii").strip()).isdigit():
        limits.append(int(text) - int(current.read_text(encoding="ascii")))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        limits.append(soft - used)
    return max(0, min(limits)) if limits else 2**63
