"""Training checkpoints: whole or not at all, and a damaged one is passed over."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from training_helpers import changed, make_fused, make_phase, parameters, untimed_metrics
from ultrafuser import files
from ultrafuser.alignment.encode import EncodedRecord
from ultrafuser.data.sampler import Draw
from ultrafuser.errors import CheckpointError
from ultrafuser.train import checkpoint as checkpoint_module
from ultrafuser.train.checkpoint import Checkpoint, find_damage, list_checkpoints, read_newest, write_checkpoint
from ultrafuser.train.loop import Loop
from ultrafuser.train.phase import describe_weights, hash_phase, join_weights


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_checkpoint(step: int) -> Checkpoint:
    return Checkpoint(
        step, {"a.weight": torch.full((2, 3), float(step))}, {"a.weight/step": torch.tensor(1.0)}, {"x": "y"}
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def truncate_file(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "no manifest": lambda folder: (folder / "MANIFEST.json").unlink(),
    "manifest cut off": lambda folder: truncate_file(folder / "MANIFEST.json"),
    "manifest of nothing": lambda folder: (folder / "MANIFEST.json").write_text("{}") and None,
    "hash changed": lambda folder: flip_byte(folder / "MANIFEST.json"),
    "parameters missing": lambda folder: (folder / "parameters.safetensors").unlink(),
    "parameters cut off": lambda folder: truncate_file(folder / "parameters.safetensors"),
    "one bit of the parameters": lambda folder: flip_byte(folder / "parameters.safetensors"),
    "one bit of the optimizer": lambda folder: flip_byte(folder / "optimizer.safetensors"),
    "one bit of the state": lambda folder: flip_byte(folder / "state.json"),
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()] and None,
}


def test_a_checkpoint_reads_back_as_it_was_written(tmp_path: Path):
    written = make_checkpoint(3)

    path = write_checkpoint(tmp_path, written, keep=1)
    read = read_newest(tmp_path)

    assert read is not None
    assert (read.step, read.state) == (3, {"x": "y"})
    assert torch.equal(read.parameters["a.weight"], written.parameters["a.weight"])
    assert torch.equal(read.optimizer["a.weight/step"], written.optimizer["a.weight/step"])
    assert names(path) == ["MANIFEST.json", "optimizer.safetensors", "parameters.safetensors", "state.json"]
    assert find_damage(path) is None


def test_no_folder_and_an_empty_one_hold_no_checkpoint(tmp_path: Path):
    assert read_newest(tmp_path) is None
    assert read_newest(tmp_path / "none") is None


@pytest.mark.parametrize("keep", [1, 2, 3, 5])
def test_the_newest_few_are_kept(tmp_path: Path, keep: int):
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, make_checkpoint(step), keep=keep)

    assert names(tmp_path) == [f"step-{step:08d}" for step in (1, 2, 3, 4)][-keep:]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_notice(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
):
    for step in (1, 2):
        path = write_checkpoint(tmp_path, make_checkpoint(step), keep=2)
    DAMAGES[damage](path)

    found = read_newest(tmp_path)

    assert found is not None
    assert found.step == 1
    assert "step-00000002 is damaged (" in caplog.text
    assert "going back to the one before" in caplog.text


def test_a_damaged_checkpoint_never_pushes_out_a_whole_one(tmp_path: Path):
    """It lies beyond the step that training went back to, so it is no newest one."""
    for step in (10, 20):
        path = write_checkpoint(tmp_path, make_checkpoint(step), keep=2)
    flip_byte(path / "parameters.safetensors")

    write_checkpoint(tmp_path, make_checkpoint(15), keep=1)

    assert names(tmp_path) == ["step-00000015"]


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path):
    path = write_checkpoint(tmp_path, make_checkpoint(2), keep=1)
    flip_byte(path / "parameters.safetensors")

    write_checkpoint(tmp_path, make_checkpoint(2), keep=1)

    assert find_damage(path) is None


def test_what_a_crash_left_behind_is_no_checkpoint_and_is_swept_away(tmp_path: Path):
    (tmp_path / ".partial-00000007").mkdir()
    (tmp_path / ".partial-00000007" / "parameters.safetensors").write_bytes(b"half")

    assert list_checkpoints(tmp_path) == []
    write_checkpoint(tmp_path, make_checkpoint(8), keep=1)

    assert names(tmp_path) == ["step-00000008"]


@pytest.mark.parametrize("part", ["save_file", "_hash", "put_in_place", "flush"])
def test_a_disk_that_refuses_is_one_clear_line_and_leaves_no_half(
    tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
):
    write_checkpoint(tmp_path, make_checkpoint(1), keep=1)

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((files, "_flush") if part == "flush" else (checkpoint_module, part)), refuse)
    with pytest.raises(CheckpointError, match=r"step 2 .*No space left on device. Make room and start again") as caught:
        write_checkpoint(tmp_path, make_checkpoint(2), keep=1)
    monkeypatch.undo()

    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["step-00000001"]
    found = read_newest(tmp_path)
    assert found is not None
    assert found.step == 1


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="needs a small disk of its own: mount")
def test_a_full_disk_is_one_clear_line_and_leaves_no_half(tmp_path: Path):
    if os.system(f"mount -t tmpfs -o size=64k tmpfs {tmp_path} 2>/dev/null") != 0:
        pytest.skip("mount is not allowed here")
    try:
        write_checkpoint(tmp_path, make_checkpoint(1), keep=1)
        big = Checkpoint(2, {"a": torch.zeros(100_000)}, {}, {})
        with pytest.raises(CheckpointError, match=r"step 2 .*Make room") as caught:
            write_checkpoint(tmp_path, big, keep=1)

        assert "\n" not in str(caught.value)
        assert names(tmp_path) == ["step-00000001"]
        write_checkpoint(tmp_path, make_checkpoint(2), keep=1)
        assert names(tmp_path) == ["step-00000002"]
    finally:
        os.system(f"umount {tmp_path}")


# --- going on from them ----------------------------------------------------------------------------------------------


def test_a_finished_phase_is_taken_from_its_checkpoint(tmp_path: Path):
    first = make_phase(tmp_path)
    Loop(first).run()
    lines = (tmp_path / "metrics.jsonl").read_text()

    again = make_phase(tmp_path)
    loop = Loop(again)
    loop._step = lambda _: pytest.fail("a step was repeated")  # type: ignore[method-assign,assignment]
    loop.run()

    assert changed(parameters(first.model), again.model) == set()
    assert (tmp_path / "metrics.jsonl").read_text() == lines


@pytest.mark.parametrize("damage", ["no manifest", "parameters cut off", "one bit of the optimizer"])
def test_training_past_a_damaged_checkpoint_ends_the_same(tmp_path: Path, damage: str):
    whole = make_phase(tmp_path / "whole", model=make_fused(dropout=0.2))
    Loop(whole).run()
    broken = make_phase(tmp_path / "broken", model=make_fused(dropout=0.2))
    Loop(broken).run()
    DAMAGES[damage](tmp_path / "broken" / "checkpoints" / "step-00000004")

    again = make_phase(tmp_path / "broken", model=make_fused(dropout=0.2))
    Loop(again).run()

    assert changed(parameters(whole.model), again.model) == set()
    metrics = [untimed_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "broken")]
    assert metrics[0] == metrics[1]
    assert find_damage(tmp_path / "broken" / "checkpoints" / "step-00000004") is None


def test_going_on_in_a_later_epoch_draws_what_comes_there_and_not_the_first_epoch_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    phase = make_phase(tmp_path, sizes={"text": 3, "code": 3})
    loop = Loop(phase)
    loop.run()
    assert all(loop.sampler.batch(step) != loop.sampler.batch(step + 2) for step in (0, 1))
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000004")

    again = make_phase(tmp_path, sizes={"text": 3, "code": 3})
    resumed = Loop(again)
    drawn: list[Draw] = []
    record = resumed._record

    def note(draw: Draw) -> EncodedRecord:
        drawn.append(draw)
        return record(draw)

    monkeypatch.setattr(resumed, "_record", note)
    resumed.run()

    assert drawn == [draw for step in (2, 3) for draw in loop.sampler.batch(step)]
    assert changed(parameters(phase.model), again.model) == set()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"name": "stage3"},
        {"stage": {"learning_rate": 1e-3}},
        {"stage": {"steps": 5}},
        {"train": {"sampler": "proportional"}},
        {"train": {"precision": "bf16"}},
        {"train": {"micro_batch_tokens": 99}},
        {"sizes": {"text": 6, "code": 4}},
        {"model": "other weights"},
    ],
    ids=str,
)
def test_changed_settings_refuse_in_one_line(tmp_path: Path, change: dict[str, Any]):
    Loop(make_phase(tmp_path)).run()
    if "model" in change:
        change = {"model": make_fused(["code", "text"])}

    with pytest.raises(CheckpointError, match="was made with other settings, data or weights") as caught:
        Loop(make_phase(tmp_path, **change)).run()

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"checkpoint_every": 1}, {"validate_every": 1}, {"keep_checkpoints": 7}, {"activation_checkpointing": True}],
    ids=str,
)
def test_settings_that_change_no_number_may_change(tmp_path: Path, change: dict[str, Any]):
    Loop(make_phase(tmp_path)).run()

    Loop(make_phase(tmp_path, train=change)).run()


def test_a_checkpoint_holds_what_is_trained_and_no_more(tmp_path: Path):
    """Stage 1 of three 13B specialists saves a gate, not 39B frozen weights."""
    Loop(make_phase(tmp_path)).run()

    found = read_newest(tmp_path / "checkpoints")

    assert found is not None
    assert all(name.startswith("fusion_gate.") for name in [*found.parameters, *found.optimizer])
    assert json.loads((tmp_path / "checkpoints" / "step-00000004" / "state.json").read_text())["step"] == 4


def test_the_number_of_threads_is_no_other_setting(tmp_path: Path):
    """A run that is gone on with on another machine has the same weights, so it has the same fingerprint."""
    model = make_fused()
    large = torch.nn.Parameter(torch.randn(400, 700))  # enough for a sum to be shared among threads
    model.fusion_gate.register_parameter("large", large)
    phase = make_phase(tmp_path, model=model)
    hashes = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        hashes.append(hash_phase(phase, join_weights([describe_weights(phase.model, {})])))
    torch.set_num_threads(1)
    with torch.no_grad():
        large[0, 0] += 1e-3

    assert hashes[0] == hashes[1]
    assert hash_phase(phase, join_weights([describe_weights(phase.model, {})])) != hashes[0]
