"""Training in several processes (gloo, 2 and 3): the numbers of one process, and no way to lose or hang."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from parallel_ranks import Ended, RankServer, free_port, rank_server
from training_helpers import make_phase, untimed_metrics, write_ingredients
from ultrafuser.errors import ConfigError
from ultrafuser.train.checkpoint import find_damage, read_checkpoint
from ultrafuser.train.parallel.deal import deal
from ultrafuser.train.parallel.world import begin_world, device_of, read_environment

SMALL = {"micro_batch_tokens": 64}  # several pieces a step in each process
SHORT = {"train_specialists": True, "steps": 2}  # the second step has moments from the first, and is saved
RUNS: dict[str, dict[str, Any]] = {
    "stage1": {"stage": {"composed_share": 0.25}, "train": SMALL},
    "stage2": {"stage": {"train_specialists": True, "composed_share": 0.25}, "train": SMALL},
    "untied": {
        "untied": True,
        "stage": {**SHORT, "gate_entropy": 0.1},
        "train": {"activation_checkpointing": True},
        "model": {"fusion_space": "probs"},
    },
    "torch's loss": {"untied": True, "stage": SHORT, "train": {"loss_backend": "torch"}},
    "offload": {"stage": SHORT, "parallel": {"cpu_offload": True}},
    "replicated": {"stage": {"steps": 2}, "parallel": {"replicate_frozen": True}},
    "adapters": {"lora": True, "stage": SHORT},
    "adapters on bf16": {"lora": True, "dtype": "bfloat16", "stage": SHORT},
    "bf16 weights": {"untied": True, "dtype": "bfloat16", "stage": SHORT},
    "bf16": {"untied": True, "stage": SHORT, "train": {"precision": "bf16"}},
}
# Three processes have parts of unequal size; what is no matter of sizes is trained in two alone.
IN_THREE = ("stage1", "stage2", "untied", "bf16 weights")
TRAINED = [(run, size) for run in RUNS for size in (2, 3) if size == 2 or run in IN_THREE]
EXACT = [pair for pair in TRAINED if "bf16" not in pair[0]]
ROUNDED = [pair for pair in TRAINED if "bf16" in pair[0]]
# Added to every score alike, so the softmax does not see it: its gradient is rounding alone, which AdamW scales up.
WITHOUT_EFFECT = "fusion_gate.layers.2.bias"
# Relative. Where an element's gradient is near zero, AdamW's first steps make its rounding large: 2.6e-5 was measured.
# Of the recipe, whose first phase has the learning rate 1e-2 and no warm-up, one element of one matrix is 3.5e-5 of its
# norm away where one process cuts its batches otherwise, 2.3e-5 in two processes, 1.7e-4 if all were done by three.
SAME_WEIGHTS = 1e-4


@pytest.fixture(scope="module")
def server() -> Iterator[RankServer]:
    with rank_server() as server:
        yield server


@pytest.fixture(scope="module")
def trained(server: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs in 1, 2 and 3 processes: `<size>/<run>/`."""
    folder = tmp_path_factory.mktemp("parallel")
    for size in (1, 2, 3):
        runs = {name: run for name, run in RUNS.items() if size < 3 or name in IN_THREE}
        for ended in server.run("phases", folder / str(size), size, runs=runs):
            assert ended.code == 0, ended.said
    return folder


@pytest.fixture(scope="module")
def recipes(server: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe trained by the command in one process and in two: `<size>/run/`."""
    folder = tmp_path_factory.mktemp("recipes")
    for size in (1, 2):
        (folder / str(size)).mkdir()
        write_ingredients(folder / str(size))
        for ended in server.run("command", folder / str(size), size):
            assert ended.code == 0, ended.said
    return folder


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / a.norm().clamp_min(1e-12))


def begin_at_stage2(trained: Path, folder: Path) -> None:
    """The recipe with all that was trained before stage 2, in one process."""
    write_ingredients(folder)
    for part in ("specialists", "stage1"):
        shutil.copytree(trained / "run" / part, folder / "run" / part)


def ours(ended: list[Ended]) -> list[str]:
    """The lines of all ranks that the command says for itself."""
    return [line for rank in ended for line in rank.said.splitlines() if line.startswith("ultrafuser:")]


@pytest.mark.parametrize(("run", "size"), EXACT)
def test_losses_norms_and_parameters_are_those_of_one_process(trained: Path, run: str, size: int):
    alone, together = (untimed_metrics(trained / str(n) / run / "metrics.jsonl") for n in (1, size))
    weights, shared = (load_file(trained / str(n) / run / "final.safetensors") for n in (1, size))

    assert [line["tokens"] for line in together] == [line["tokens"] for line in alone]
    for mine, theirs in zip(alone, together, strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=2e-6)
        assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=2e-5)
        assert theirs["loss_per_domain"] == pytest.approx(mine["loss_per_domain"], rel=5e-6)
        for domain, gate_weights in mine["gate_weights"].items():
            assert theirs["gate_weights"][domain] == pytest.approx(gate_weights, rel=1e-5)
        assert theirs.get("validation", {}) == pytest.approx(mine.get("validation", {}), rel=5e-6)
    assert max(relative_difference(weights[n], shared[n]) for n in weights if n != WITHOUT_EFFECT) < SAME_WEIGHTS


@pytest.mark.parametrize(("run", "size"), ROUNDED)
def test_bf16_is_that_of_one_process_to_its_rounding(trained: Path, run: str, size: int):
    """Trainable bf16 weights beside an fp32 gate, too, which must not share a unit (torch refuses mixed types)."""
    alone, together = (untimed_metrics(trained / str(n) / run / "metrics.jsonl")[:2] for n in (1, size))

    for mine, theirs in zip(alone, together, strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=2e-3)
        assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=2e-2)


@pytest.mark.parametrize("size", [2, 3])
def test_a_checkpoint_of_stage_1_holds_the_gate_alone(trained: Path, size: int):
    folder = trained / str(size) / "stage1" / "checkpoints" / "step-00000004"
    names = {name for path in folder.glob("shard-*") for name in safe_open(path, framework="pt").keys()}  # noqa: SIM118

    assert {name.split(".")[0] for name in names} == {"fusion_gate"}
    assert find_damage(folder) is None
    assert not [path for path in folder.iterdir() if path.suffix not in (".safetensors", ".json")]


def test_a_checkpoint_in_parts_reads_back_whole(trained: Path):
    for size in (2, 3):
        checkpoint = read_checkpoint(trained / str(size) / "stage2" / "checkpoints" / "step-00000004")
        final = load_file(trained / str(size) / "stage2" / "final.safetensors")

        assert checkpoint.step == 4
        assert all(torch.equal(value, final[name]) for name, value in checkpoint.parameters.items())
        assert {int(checkpoint.optimizer[f"{name}/step"]) for name in checkpoint.parameters} == {4}
        assert all(
            checkpoint.optimizer[f"{name}/exp_avg"].shape == value.shape
            for name, value in checkpoint.parameters.items()
        )


@pytest.mark.parametrize(("wrote", "goes_on"), [(2, 1), (2, 3), (3, 2), (1, 2)])
def test_a_checkpoint_goes_on_in_another_number_of_processes(
    trained: Path, server: RankServer, tmp_path: Path, wrote: int, goes_on: int
):
    run = {"stage2": RUNS["stage2"]}
    shutil.copytree(trained / str(wrote) / "stage2", tmp_path / "stage2")
    shutil.rmtree(tmp_path / "stage2" / "checkpoints" / "step-00000004")

    ended = server.run("phases", tmp_path, goes_on, runs=run)

    assert [rank.code for rank in ended] == [0] * goes_on, ended
    assert "goes on from step 2 of 4" in ended[0].said
    whole, resumed = (load_file(f / "stage2" / "final.safetensors") for f in (trained / "1", tmp_path))
    assert max(relative_difference(whole[n], resumed[n]) for n in whole if n != WITHOUT_EFFECT) < SAME_WEIGHTS


def test_a_damaged_part_is_passed_over_by_all(trained: Path, server: RankServer, tmp_path: Path):
    shutil.copytree(trained / "2" / "stage1", tmp_path / "stage1")
    part = next((tmp_path / "stage1" / "checkpoints" / "step-00000004").glob("shard-00002*"))
    part.write_bytes(part.read_bytes()[:-8])

    ended = server.run("phases", tmp_path, 2, runs={"stage1": RUNS["stage1"]})

    assert [rank.code for rank in ended] == [0, 0], ended
    assert "step-00000004 is damaged" in ended[0].said
    assert "goes on from step 2 of 4" in ended[0].said


def test_the_command_makes_the_model_that_one_process_makes(recipes: Path):
    """A tuned specialist, both stages, export: the saved folders are the same to rounding."""
    alone, together = (load_file(recipes / str(n) / "run" / "model" / "model.safetensors") for n in (1, 2))
    tuned = [load_file(recipes / str(n) / "run" / "specialists" / "text" / "model.safetensors") for n in (1, 2)]

    assert alone.keys() == together.keys()
    assert max(relative_difference(alone[n], together[n]) for n in alone if n != WITHOUT_EFFECT) < SAME_WEIGHTS
    assert max(relative_difference(tuned[0][n], tuned[1][n]) for n in tuned[0]) < SAME_WEIGHTS
    assert not list((recipes / "2" / "run").glob("**/.p*"))  # neither partial nor probe


@pytest.mark.parametrize(("size", "killed"), [(2, 1), (3, 0)])
def test_a_killed_process_ends_all_with_one_message_and_the_run_goes_on(
    recipes: Path, server: RankServer, tmp_path: Path, size: int, killed: int
):
    begin_at_stage2(recipes / "1", tmp_path)
    kill = {"rank": killed, "number": signal.SIGKILL, "file": "run/stage2/metrics.jsonl", "lines": 3}

    ended = server.run("command", tmp_path, size, kill=kill)
    again = server.run("command", tmp_path, 2)

    assert ended[killed].code == -signal.SIGKILL
    assert [rank.code for i, rank in enumerate(ended) if i != killed] == [1] * (size - 1), ended
    lines = ours(ended)
    # The first process keeps the account of who has told (under torchrun its agent does): without it all tell.
    assert len(lines) == (1 if killed else size - 1)
    assert all("stage2: a process of this run ended or does not answer" in line for line in lines)
    assert all("start again to go on from step-00000002" in line for line in lines)
    assert [rank.code for rank in again] == [0, 0], again
    assert "stage2 goes on from step 2 of 4" in again[0].said
    alone, after = (load_file(f / "run" / "model" / "model.safetensors") for f in (recipes / "1", tmp_path))
    assert max(relative_difference(alone[n], after[n]) for n in alone if n != WITHOUT_EFFECT) < SAME_WEIGHTS


def test_a_signal_to_one_process_stops_all_after_the_same_step(recipes: Path, server: RankServer, tmp_path: Path):
    begin_at_stage2(recipes / "1", tmp_path)
    stop = {"rank": 1, "number": signal.SIGTERM, "file": "run/stage2/metrics.jsonl", "lines": 1}

    ended = server.run("command", tmp_path, 2, kill=stop)
    steps = len(untimed_metrics(tmp_path / "run" / "stage2" / "metrics.jsonl"))
    again = server.run("command", tmp_path, 2)

    assert [rank.code for rank in ended] == [130, 130], ended
    assert not any("Traceback" in rank.said for rank in ended)
    assert sum("stopping: this step is finished and saved first" in rank.said for rank in ended) == 1
    assert f"stage2 goes on from step {steps} of 4" in again[0].said


def test_torchrun_runs_the_command(recipes: Path, tmp_path: Path):
    """As documented; only the first process says where the model is."""
    write_ingredients(tmp_path)
    shutil.copytree(recipes / "2" / "run", tmp_path / "run")
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]

    done = subprocess.run(
        [sys.executable, *command, "-m", "ultrafuser", "train", str(tmp_path / "tiny.yaml")],
        capture_output=True,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "run" / "model")]


REFUSALS: dict[str, tuple[list[str], str]] = {
    "stage 1 from disk": (["train.stage1_cache.mode=window"], "is for one process, and there are 2"),
    "an output that is a file": (["output={folder}/text.jsonl"], "cannot write to {folder}/text.jsonl"),
    "a missing file of data": (["data.domains.text.sources=[{{path: {folder}/none.jsonl}}]"], "none.jsonl"),
    "one GPU for all": (["train.device=cuda:0"], "train.device 'cuda:0'"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_one_line_before_any_weights_load(server: RankServer, tmp_path: Path, case: str):
    overrides, message = REFUSALS[case]
    write_ingredients(tmp_path)
    for path in tmp_path.glob("*-base/model.safetensors"):
        path.write_bytes(b"reading this would be another error")

    ended = server.run("command", tmp_path, 2, overrides=[o.format(folder=tmp_path) for o in overrides])

    assert [rank.code for rank in ended] == [1, 1], ended
    (line,) = ours(ended)
    assert message.format(folder=tmp_path) in line
    assert not any("Traceback" in rank.said for rank in ended)


def test_processes_with_different_recipes_are_refused(server: RankServer, tmp_path: Path):
    write_ingredients(tmp_path)

    ended = server.run("command", tmp_path, 2, overrides_of={"1": ["stage2.steps=5"]})

    assert [rank.code for rank in ended] == [1, 1], ended
    (line,) = ours(ended)
    assert "has another recipe than process" in line


def test_a_loss_that_is_not_finite_ends_all_with_one_line(recipes: Path, server: RankServer, tmp_path: Path):
    begin_at_stage2(recipes / "1", tmp_path)

    ended = server.run(
        "command", tmp_path, 2, overrides=["stage2.learning_rate=1e20", "stage2.gate_learning_rate=1e20"]
    )

    assert [rank.code for rank in ended] == [1, 1], ended
    (line,) = ours(ended)
    assert "are not finite. Batch: " in line


def test_a_disk_that_refuses_a_part_ends_all_and_loses_nothing(server: RankServer, tmp_path: Path):
    """Only the second process's files may not grow: its part of the checkpoint fails, and so all do."""
    write_ingredients(tmp_path)

    ended = server.run("command", tmp_path, 2, size_limits={"1": 5000})

    assert [rank.code for rank in ended] == [1, 1], ended
    (line,) = ours(ended)
    assert "cannot write the checkpoint of step 2 to" in line
    assert not list((tmp_path / "run").glob("*/checkpoints/*"))
    assert not list((tmp_path / "run").glob("*/checkpoints/.p*"))


def test_what_one_process_does_alone_may_take_longer_than_a_step_may_wait(server: RankServer, tmp_path: Path):
    """As where one encodes its data more slowly than the others, or the first one writes the model."""
    ended = server.run("slow", tmp_path, 2, timeout_s=2.0, takes_s=3.0)

    assert [rank.code for rank in ended] == [0, 0], ended


def test_processes_that_do_not_come_are_one_line(monkeypatch: pytest.MonkeyPatch):
    set_environment(monkeypatch, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_PORT=str(free_port()))

    message = r"the 2 processes of this run did not find each other within 1 s"
    with pytest.raises(ConfigError, match=message), begin_world("cpu", timeout_s=1.0):
        pass


def set_environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400", **values}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2, WORLD_SIZE=2 and LOCAL_RANK=0 do not fit"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "do not fit together"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=x in the environment is no number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is not set"),
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK is not set"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_an_environment_that_does_not_fit_is_one_line(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], message: str
):
    set_environment(monkeypatch, **values)

    with pytest.raises(ConfigError, match=message):
        read_environment()


def test_without_a_launcher_the_world_has_one_process():
    with begin_world("cpu") as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert world.gather("value") == ["value"]
        assert not torch.distributed.is_initialized()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    with pytest.raises(ConfigError, match=r"there are 2 GPUs here, and process 2 .* --nproc-per-node 2"):
        device_of(2, None)


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("max_columns", [1, 60, 10_000])
def test_every_process_runs_as_many_passes_and_every_record_counts_once(tmp_path: Path, parts: int, max_columns: int):
    phase = make_phase(tmp_path, sizes={"text": 6, "code": 5})
    records = [record for domain in phase.records.values() for record in domain]

    hands = [deal(records, parts=parts, part=part, max_columns=max_columns) for part in range(parts)]

    assert len({len(hand) for hand in hands}) == 1
    counted = [record.id for hand in hands for share in hand if share.counts for record in share.records]
    assert sorted(counted) == sorted(record.id for record in records)
    for share in (share for hand in hands for share in hand):
        assert len(share.records) == 1 or len(share.records) * share.records[-1].num_columns <= max_columns
    assert deal([], parts=parts, part=0, max_columns=max_columns) == []


def test_lines_of_metrics_are_written_once(trained: Path):
    lines = (trained / "3" / "stage2" / "metrics.jsonl").read_text().splitlines()

    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
