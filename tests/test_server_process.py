"""`ultrafuser serve` as a process: one clear line for each mistake, signals, and trouble from outside."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers import make_fused, make_model, make_tokenizer, save_specialist
from server_helpers import ASK, Command, Commands, eventually
from ultrafuser.model.checkpoint import save_fused
from ultrafuser.model.specialist import parse_source

Body = dict[str, Any]
LONG: Body = ASK | {"model": "m", "max_tokens": 300, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    commands = Commands()
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fused(make_fused(), tmp_path_factory.mktemp("fused") / "m", tokenizer=make_tokenizer())


def start(commands: Commands, folder: Path, place: Path | str, *more: str, **limits: Any) -> Command:
    return commands.start(folder, "serve", str(place), "--port", "0", "--max-context", "512", *more, **limits)


def ask(url: str, **changes: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=ASK | {"model": "m", "max_tokens": 4} | changes, timeout=20)


def assert_one_line(command: Command, *words: str) -> None:
    assert command.wait() == 1, command.err
    assert command.out == ""
    line = [line for line in command.err.splitlines() if "Loading weights" not in line]
    assert len(line) == 1, command.err
    assert line[0].startswith("ultrafuser: ")
    assert len(line[0]) < 500
    for word in words:
        assert word in line[0]


def test_the_real_command_answers_and_says_where(tmp_path: Path, model: Path):
    """Typed as a user types it, imports and all."""
    script = Path(sys.executable).with_name("ultrafuser")
    begin = time.monotonic()
    process = subprocess.Popen(
        [script, "serve", model, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    reply = ask(line.split()[-1])
    took = time.monotonic() - begin
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)

    assert line.startswith("m is served at http://127.0.0.1:"), err
    assert reply.status_code == 200
    assert process.returncode == 0
    assert out == ""
    entries = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert [entry["event"] for entry in entries] == ["request", "stopped"]
    assert took < 60  # on a machine that does other things, too; the figure is in docs/serve.md


def test_a_fused_model_a_lone_specialist_and_a_gate_are_served(commands: Commands, tmp_path: Path, model: Path):
    folders = {name: save_specialist(make_model(seed=seed), tmp_path / name) for seed, name in enumerate("abc")}
    fused = make_fused({name: parse_source(folder) for name, folder in folders.items()})  # type: ignore[misc]
    gate = save_fused(fused, tmp_path / "gate", tokenizer=make_tokenizer(), gate_only=True)
    runs = {
        "fused": start(commands, tmp_path / "1", model, "--name", "m"),
        "lone": start(commands, tmp_path / "2", folders["a"], "--name", "m", "--template", "ultralm"),
        "gate": start(commands, tmp_path / "3", gate, "--name", "m"),
    }
    names = {}
    for kind, command in runs.items():
        url = command.url()
        assert ask(url).status_code == 200
        names[kind] = httpx.get(f"{url}/v1/models").json()["data"][0]["fusion"]["specialists"]
        command.signal(signal.SIGTERM)

    assert names == {"fused": ["text", "code", "math"], "lone": ["model"], "gate": ["a", "b", "c"]}
    assert [command.wait() for command in runs.values()] == [0, 0, 0]


def test_mistakes_are_one_line(commands: Commands, tmp_path: Path, model: Path):
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    (tmp_path / "empty").write_text("# nothing\n")
    (tmp_path / "folder").mkdir()
    cases: dict[str, tuple[list[str], list[str]]] = {
        "no folder": (["/nowhere/at/all"], ["/nowhere/at/all"]),
        "no model": ([str(tmp_path / "folder")], ["config.json"]),
        "taken port": ([str(model), "--port", str(taken.getsockname()[1])], ["in use", "--port"]),
        "no key file": ([str(model), "--api-keys", str(tmp_path / "none")], ["key file", "none"]),
        "no key in it": ([str(model), "--api-keys", str(tmp_path / "empty")], ["no key"]),
        "open to all": ([str(model), "--host", "0.0.0.0"], ["--api-keys", "--without-keys"]),
        "no such host": ([str(model), "--host", "256.1.1.1", "--without-keys"], ["256.1.1.1"]),
        "too long": ([str(model), "--max-context", "100000"], ["100000"]),
        "no such device": ([str(model), "--device", "abacus"], ["abacus"]),
    }
    with taken:
        runs = {
            name: (commands.start(tmp_path / name, "serve", "--port", "0", *argv), words)
            for name, (argv, words) in cases.items()
        }
        for command, words in runs.values():
            assert_one_line(command, *words)


def weights_of(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def damage(kind: str, folder: Path) -> None:
    """Row 29: what can be wrong with weights."""
    file = weights_of(folder)
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if kind == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "flipped":
        file.write_bytes(data[:20] + bytes([data[20] ^ 255]) + data[21:])
    elif kind == "header length":
        file.write_bytes(struct.pack("<Q", 2**63) + data[8:])
    elif kind == "overlap":
        first, second = list(header)[-2:]
        header[second]["data_offsets"] = header[first]["data_offsets"]
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    elif kind == "pickle":
        file.rename(folder / "pytorch_model.bin")
    elif kind == "other sizes":
        from safetensors.torch import load_file, save_file

        save_file({name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in load_file(file).items()}, file)
    elif kind == "config":
        (folder / "config.json").write_text("{")
    elif kind == "foreign code":
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        config["model_type"] = "evil"
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "evil.py").write_text(f"open({str(folder / 'was-here')!r}, 'w')\n")


DAMAGES = [
    "truncated",
    "empty",
    "flipped",
    "header length",
    "overlap",
    "pickle",
    "other sizes",
    "config",
    "foreign code",
]


def test_row_29_damaged_models_are_refused_by_name(commands: Commands, tmp_path: Path):
    runs = {}
    for kind in DAMAGES:
        folder = save_fused(make_fused(), tmp_path / kind.replace(" ", "-"), tokenizer=make_tokenizer())
        damage(kind, folder)
        runs[kind] = start(commands, tmp_path / f"{kind} run", folder)
    for kind, command in runs.items():
        assert command.wait() == 1, (kind, command.out, command.err)
        assert "Traceback" not in command.err, (kind, command.err)
        assert kind.replace(" ", "-") in command.err, (kind, command.err)
        assert not list((tmp_path / kind.replace(" ", "-")).glob("was-here"))


def test_row_29_a_gate_whose_specialist_has_changed_is_refused(commands: Commands, tmp_path: Path):
    folders = {name: save_specialist(make_model(seed=seed), tmp_path / name) for seed, name in enumerate("ab")}
    fused = make_fused({name: parse_source(folder) for name, folder in folders.items()})  # type: ignore[misc]
    gate = save_fused(fused, tmp_path / "gate", tokenizer=make_tokenizer(), gate_only=True)
    save_specialist(make_model(seed=9), folders["b"])

    assert_one_line(start(commands, tmp_path / "run", gate), "'b'", "not the one")


STRANGERS = [
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ lipsum.__globals__['os'].system('touch /tmp/was-here') }}",
    "{% broken",
]


@pytest.fixture(scope="module")
def tried(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Command]:
    """A server for each template, all side by side: one that does not end is waited for."""
    runs = {}
    for template in STRANGERS:
        root = tmp_path_factory.mktemp("strangers")
        folder = save_specialist(make_model(), root / "lone")
        (folder / "chat_template.jinja").write_text(template)
        runs[template] = start(commands, root / "run", folder)
    return runs


@pytest.mark.parametrize("template", STRANGERS, ids=lambda template: template[:30])
def test_row_30_templates_of_strangers_are_tried_before_anything_is_served(tried: dict[str, Command], template: str):
    command = tried[template]

    assert command.wait(40) == 1, (command.out, command.err)
    assert "Traceback" not in command.err
    assert "template" in command.err


def test_too_little_memory_is_one_line(model: Path, monkeypatch: pytest.MonkeyPatch):
    from ultrafuser.errors import ModelError
    from ultrafuser.server import preflight

    monkeypatch.setattr(preflight, "available_bytes", lambda: 1000)
    with pytest.raises(ModelError, match="too little memory") as error:
        preflight.check_model(str(model))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")],
    ids=repr,
)
def test_memory_that_runs_out_while_loading_is_one_line(model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception):
    from ultrafuser.engine import load
    from ultrafuser.errors import ModelError
    from ultrafuser.server.process import ServeOptions, serve

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(load, "load_engine", fail)
    with pytest.raises(ModelError, match="too little memory") as found:
        serve(ServeOptions(str(model), port=0))
    assert "\n" not in str(found.value)


def open_stream(url: str) -> tuple[httpx.Client, Any, Iterator[str]]:
    client = httpx.Client(timeout=30)
    stream = client.send(client.build_request("POST", f"{url}/v1/chat/completions", json=LONG), stream=True)
    lines = stream.iter_lines()
    next(lines)
    return client, stream, lines


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_row_27_a_signal_drains(commands: Commands, tmp_path: Path, model: Path, number: int):
    command = start(commands, tmp_path, model)
    url = command.url()
    client, _, lines = open_stream(url)

    command.signal(number)
    assert eventually(lambda: refuses(url))
    rest = [line for line in lines if line]
    client.close()

    assert rest[-1] == "data: [DONE]"
    assert command.wait() == 0
    assert not children(command.pid)


def test_row_27_a_second_signal_ends_at_once(commands: Commands, tmp_path: Path, model: Path):
    command = start(commands, tmp_path, model)
    client, stream, lines = open_stream(command.url())
    os.kill(command.pid, signal.SIGSTOP)  # so that the answer is not over before the signals
    command.signal(signal.SIGTERM)
    os.kill(command.pid, signal.SIGCONT)
    time.sleep(0.05)
    command.signal(signal.SIGTERM)

    assert command.wait(10) in (130, 0)
    client.close()
    del stream, lines
    assert not children(command.pid)


def refuses(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 503
    except httpx.TransportError:
        return True


def children(pid: int) -> list[str]:
    file = Path(f"/proc/{pid}/task/{pid}/children")
    return file.read_text().split() if file.exists() else []


def test_row_28_a_log_that_cannot_be_written_stops_nothing(commands: Commands, tmp_path: Path, model: Path):
    command = start(commands, tmp_path, model, err="/dev/full")
    url = command.url()

    assert [ask(url).status_code for _ in range(5)] == [200] * 5
    figures = httpx.get(f"{url}/metrics").text
    assert float(figures.split("\nultrafuser:log_lines_dropped_total ")[1].split()[0]) >= 5
    command.signal(signal.SIGTERM)
    assert command.wait() == 0


def test_row_34_few_file_handles(commands: Commands, tmp_path: Path, model: Path):
    """`ulimit -n 64`: too many connections are refused, and when they are gone all is well."""
    command = start(commands, tmp_path, model, nofile=64)
    url = command.url()
    host, port = url.removeprefix("http://").split(":")
    assert ask(url).status_code == 200

    held = []
    for _ in range(150):
        connection = socket.create_connection((host, int(port)), timeout=5)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        held.append(connection)
    for connection in held:
        connection.close()

    assert eventually(lambda: ask(url).status_code == 200, 10)
    command.signal(signal.SIGTERM)
    assert command.wait() == 0
