"""What training reports: the metrics file, TensorBoard, trackio and wandb without a network, a tracker that fails."""

import json
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from training_helpers import Observers, make_phase, untimed_metrics, write_ingredients
from ultrafuser.config.load import load_recipe
from ultrafuser.errors import ConfigError, TrainingError
from ultrafuser.train.loop import Loop
from ultrafuser.train.tracking import tracker
from ultrafuser.train.tracking.metrics import MetricsFile, read_metrics
from ultrafuser.train.tracking.phase import TrackedPhase
from ultrafuser.train.tracking.tracker import choose_trackers
from ultrafuser.train.trainer import Trainer


def train(folder: Path, *trackers: str, **options: Any) -> None:
    observers = Observers(run="tiny", config={"seed": 7, "stage1": {"steps": 4}}, trackers=trackers)
    Loop(make_phase(folder, observers=observers, **options)).run()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Whatever address outside this machine was asked for; each is refused."""
    asked: list[Any] = []
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            asked.append(address)
            raise OSError(101, "Network is unreachable")
        connect(self, address)

    def resolve(host: Any, *_: Any, **__: Any) -> Any:
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return asked


# --- always ----------------------------------------------------------------------------------------------------------


def test_without_a_tracker_metrics_are_written_all_the_same(tmp_path: Path):
    train(tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "checkpoints"}
    assert len(untimed_metrics(tmp_path / "metrics.jsonl")) == 4


def test_where_there_is_no_terminal_progress_is_a_line_with_the_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train(tmp_path)

    assert "stage1: step 4/4, loss " in capsys.readouterr().err


def test_a_metrics_file_cut_off_in_a_line_is_read_up_to_it(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"st')

    metrics = MetricsFile(path, resume_step=1)
    metrics.write({"step": 1, "again": True})
    metrics.close()

    assert list(read_metrics(path)) == [{"step": 0}, {"step": 1, "again": True}]


def test_metrics_that_cannot_be_written_stop_training_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MetricsFile, "write", refuse)

    with pytest.raises(TrainingError, match=r"cannot write metrics to .*: No space left on device. Make room"):
        train(tmp_path)


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def scalars(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulator.EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return board


def test_tensorboard_gets_every_number(tmp_path: Path):
    train(tmp_path, "tensorboard")

    board = scalars(tmp_path)
    wanted = {"loss", "grad_norm", "tokens_per_s", "loss_per_domain/text", "gate_weights/text/code", "validation/code"}
    assert wanted <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4]
    lines = untimed_metrics(tmp_path / "metrics.jsonl")
    assert [event.value for event in board.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])


def train_until(step: int, monkeypatch: pytest.MonkeyPatch, folder: Path, *trackers: str) -> None:
    """Training breaks off in this step; a checkpoint is written after every second."""
    real = Loop._step

    def ends(self: Loop, number: int) -> dict[str, Any]:
        if number == step:
            raise MemoryError
        return real(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", ends)
        with pytest.raises(MemoryError):
            train(folder, *trackers)


def test_steps_done_again_stand_once_in_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train_until(3, monkeypatch, tmp_path, "tensorboard")

    train(tmp_path, "tensorboard")

    assert [event.step for event in scalars(tmp_path).Scalars("loss")] == [1, 2, 3, 4]


def test_the_default_is_tensorboard_where_it_is_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tracker, "_is_installed", lambda module: module == "tensorboard")
    assert choose_trackers(None) == ("tensorboard",)

    monkeypatch.setattr(tracker, "_is_installed", lambda _: False)
    assert choose_trackers(None) == ()


# --- refused before any weights load ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "extra"), [("tensorboard", "tracking"), ("trackio", "trackio"), ("wandb", "wandb")], ids=str
)
def test_a_tracker_that_is_not_installed_is_one_line_before_anything_is_read(
    tmp_path: Path, name: str, extra: str, monkeypatch: pytest.MonkeyPatch
):
    recipe = load_recipe(write_ingredients(tmp_path), [f"train.trackers=[{name}]"])
    monkeypatch.setattr(tracker, "_is_installed", lambda module: module != name)
    monkeypatch.setattr("ultrafuser.train.trainer.load_dataset", lambda _: pytest.fail("data was read"))

    with pytest.raises(ConfigError, match=rf"trackers names {name}, .* pip install 'ultrafuser\[{extra}\]'"):
        Trainer(recipe)


def test_an_unknown_tracker_is_refused_with_the_recipe(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"train\.trackers\.0: Input should be 'tensorboard', 'trackio' or 'wandb'"):
        load_recipe(write_ingredients(tmp_path), ["train.trackers=[mlflow]"])


# --- a tracker that fails --------------------------------------------------------------------------------------------


class Flaky:
    """Fails when it begins, in a step or at the end."""

    def __init__(self, when: str) -> None:
        self.when, self.logged = when, list[int]()
        self.fail("begin")

    def fail(self, now: str) -> None:
        if now == self.when:
            raise ConnectionResetError("the service\nwent away")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        del numbers
        if step == 2:
            self.fail("step")
        self.logged.append(step)

    def close(self) -> None:
        self.fail("finish")


@pytest.mark.parametrize(("when", "what"), [("begin", "begin"), ("step", "log step 2"), ("finish", "finish")], ids=str)
def test_a_remote_tracker_that_fails_is_told_once_and_costs_no_training(
    tmp_path: Path, when: str, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    kind = tracker.TrackerKind("wandb", "wandb", lambda _: Flaky(when))
    monkeypatch.setattr(tracker, "tracker_kinds", lambda: {"wandb": kind})

    train(tmp_path, "wandb")

    assert [line["step"] for line in untimed_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    told = [record.getMessage() for record in caplog.records if "wandb" in record.getMessage()]
    assert told == [
        f"wandb could not {what} (ConnectionResetError: the service went away): training goes on without it, and every "
        f"number is in {tmp_path / 'metrics.jsonl'}"
    ]


def test_a_local_tracker_that_cannot_write_stops_training_in_one_line(tmp_path: Path):
    (tmp_path / "tensorboard").write_text("no folder")

    with pytest.raises(TrainingError, match="cannot write metrics to"):
        train(tmp_path, "tensorboard")


# --- ids -------------------------------------------------------------------------------------------------------------


def test_a_phase_keeps_its_id_and_another_folder_has_another(tmp_path: Path):
    first = TrackedPhase("tiny", "stage1", tmp_path / "a")
    assert first.id_for("wandb") == first.id_for("wandb") != first.id_for("trackio")
    assert TrackedPhase("tiny", "stage1", tmp_path / "a", resume_step=2).id_for("wandb") == first.id_for("wandb")
    assert TrackedPhase("tiny", "stage1", tmp_path / "b").id_for("wandb") != first.id_for("wandb")


# --- trackio ---------------------------------------------------------------------------------------------------------

TRACKIO_DIR = "TRACKIO_DIR"


@pytest.fixture
def trackio_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("trackio")
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(TRACKIO_DIR, str(folder))
    storage = pytest.importorskip("trackio.sqlite_storage", reason="trackio is not installed")
    utils = pytest.importorskip("trackio.utils")
    # Read from the environment once, at import; another test may have imported it.
    for module in (utils, storage):
        for name in ("TRACKIO_DIR", "MEDIA_DIR", "ARTIFACTS_DIR"):
            if hasattr(module, name):
                place = folder if name == TRACKIO_DIR else folder / name.split("_")[0].lower()
                monkeypatch.setattr(module, name, place)
    return folder


def test_trackio_gets_every_number_on_this_disk_alone_and_goes_on_after_a_resume(
    tmp_path: Path, trackio_folder: Path, no_network: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    train_until(2, monkeypatch, tmp_path, "trackio")
    train(tmp_path, "trackio")

    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs("ultrafuser")
    name = run["name"] if isinstance(run, dict) else run
    assert name == f"tiny-stage1-{json.loads((tmp_path / 'trackers.json').read_text())['trackio']}"
    logs = SQLiteStorage.get_logs("ultrafuser", name)
    lines = untimed_metrics(tmp_path / "metrics.jsonl")
    assert [log["step"] for log in logs] == [1, 2, 3, 4]
    assert [log["loss"] for log in logs] == pytest.approx([line["loss"] for line in lines])
    assert {"gate_weights/text/code", "validation/code"} <= set(logs[-1])
    assert no_network == []
    assert list(trackio_folder.glob("ultrafuser*.db"))
    assert capsys.readouterr().out == ""  # results only, and there are none


# --- wandb -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def wandb_listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """wandb offline; a socket that anything it sends, itself or by its service, would arrive at."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for name in ("WANDB_BASE_URL", "HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"):
            monkeypatch.setenv(name, address)
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")  # the adapter's default; here so that it is taken back
        yield listener
        wandb.teardown()


def logged(run: Path) -> list[dict[str, Any]]:
    """The rows of an offline run, read from its file: W&B's header, then LevelDB's log format of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run.glob("*.wandb")
    data, at, parts, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # a block's end holds no head
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_wandb_offline_sends_nothing_and_goes_on_with_the_same_run(
    tmp_path: Path, wandb_listener: socket.socket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    train_until(3, monkeypatch, tmp_path, "wandb")
    train(tmp_path, "wandb")

    run_id = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"), key=lambda run: run.stat().st_ctime_ns)
    assert [run.name.split("-")[-1] for run in runs] == [run_id, run_id]
    before, after = (logged(run) for run in runs)
    lines = untimed_metrics(tmp_path / "metrics.jsonl")
    assert [row["_step"] for row in before] == [1, 2, 3]
    assert [row["_step"] for row in after] == [3, 4]  # step 3 was not saved: once more, with the same numbers
    assert [row["loss"] for row in (*before, after[-1])] == pytest.approx([line["loss"] for line in lines])
    assert {"gate_weights/text/code", "validation/code"} <= set(after[-1])
    with pytest.raises(BlockingIOError):
        wandb_listener.accept()
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("wandb_listener")
def test_wandb_without_a_login_is_one_line_and_no_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import wandb

    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for mode, key, netrc, refused in (
        ("offline", None, "", False),
        ("online", None, "", True),
        ("online", "k" * 40, "", False),
        ("online", None, f"machine 127.0.0.1 login user password {'k' * 40}\n", False),
    ):
        monkeypatch.setenv("WANDB_MODE", mode)
        monkeypatch.setenv("WANDB_API_KEY", key) if key else monkeypatch.delenv("WANDB_API_KEY", raising=False)
        (tmp_path / "netrc").write_text(netrc)
        (tmp_path / "netrc").chmod(0o600)
        wandb.teardown()  # settings are read once

        if refused:
            with pytest.raises(
                ConfigError, match=r"nobody is logged in to 127\.0\.0\.1: run wandb login, or set WANDB_MODE"
            ):
                choose_trackers(["wandb"])
        else:
            assert choose_trackers(["wandb"]) == ("wandb",)
