"""Training survives: killed, interrupted or out of disk at any moment, it ends as if nothing had happened.

Runs happen in forked children of a server that has everything imported (`training_helpers`).
"""

import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from training_helpers import DOMAINS, TrainingServer, training_server, untimed_metrics, write_ingredients
from ultrafuser.chat.library import load_template
from ultrafuser.chat.messages import Message
from ultrafuser.config.load import load_recipe
from ultrafuser.errors import ModelError
from ultrafuser.generation import SamplingParams
from ultrafuser.model.generator import FusedGenerator
from ultrafuser.train.checkpoint import find_damage, list_checkpoints
from ultrafuser.train.trainer import Trainer

PHASE = {"stage": {"train_specialists": True, "composed_share": 0.25}, "train": {"keep_checkpoints": 1}}
PHASES = ("tune-text", "stage1", "stage2")


@pytest.fixture(scope="module")
def server() -> Iterator[TrainingServer]:
    with training_server() as running:
        yield running


@pytest.fixture(scope="module")
def whole_phase(server: TrainingServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phase that nothing broke."""
    folder = tmp_path_factory.mktemp("whole-phase")
    code, said, _ = server.run("phase", folder, phase=PHASE, kill_at=None)
    assert code == 0, said
    return folder


@pytest.fixture(scope="module")
def ingredients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ingredients(tmp_path_factory.mktemp("ingredients")).parent


@pytest.fixture(scope="module")
def whole_run(server: TrainingServer, ingredients: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe trained by `ultrafuser train` that nothing broke."""
    folder = copy_ingredients(ingredients, tmp_path_factory.mktemp("whole-run"))
    code, said, _ = server.run("command", folder)
    assert code == 0, said
    return folder


def copy_ingredients(ingredients: Path, folder: Path) -> Path:
    shutil.copytree(ingredients, folder, dirs_exist_ok=True)
    text = (folder / "tiny.yaml").read_text()
    (folder / "tiny.yaml").write_text(text.replace(str(ingredients / "run"), str(folder / "run")))
    return folder


def assert_same_phase(folder: Path, whole: Path) -> None:
    expected, actual = load_file(whole / "final.safetensors"), load_file(folder / "final.safetensors")
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    assert untimed_metrics(folder / "metrics.jsonl") == untimed_metrics(whole / "metrics.jsonl")


def assert_same_run(folder: Path, whole: Path) -> None:
    expected, actual = (load_file(place / "run" / "model" / "model.safetensors") for place in (whole, folder))
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    for phase in PHASES:
        lines = [untimed_metrics(place / "run" / phase / "metrics.jsonl") for place in (whole, folder)]
        assert lines[0] == lines[1]
        left = sorted(path.name for path in (folder / "run" / phase / "checkpoints").iterdir())
        assert left == ["step-00000004"]


def test_killed_at_every_write_of_a_checkpoint_it_ends_the_same(
    server: TrainingServer, whole_phase: Path, tmp_path: Path
):
    """Before, between and after files, before and after the rename, while old checkpoints are deleted, in a step."""
    log = (whole_phase / "events").read_text().splitlines()
    steps = [number for number, name in enumerate(log, start=1) if name == "after _step"]
    assert len(steps) == 4
    # From the second step, over its checkpoint, to the end of the third; then where a checkpoint is deleted once the
    # next is in place. What is after one write is before another.
    points = [n for n in range(steps[1], steps[2]) if log[n - 1].startswith("before") or log[n - 1] == "after rename"]
    points += [n for n in range(steps[3], len(log) + 1) if log[n - 1].endswith(("rename", "rmtree"))]
    assert {"before save_file", "before _flush", "before rename", "after rename"} <= {log[n - 1] for n in points}

    for point in points:
        folder = tmp_path / f"killed-{point}"
        folder.mkdir()
        code, said, events = server.run("phase", folder, phase=PHASE, kill_at=point)
        assert (code, events) == (-signal.SIGKILL, point), said
        assert all(find_damage(path) is None for path in list_checkpoints(folder / "checkpoints"))

        code, said, _ = server.run("phase", folder, phase=PHASE)

        assert code == 0, said
        assert_same_phase(folder, whole_phase)


def test_killed_again_and_again_it_ends_the_same(server: TrainingServer, whole_phase: Path, tmp_path: Path):
    """Each time some way further, at a random event."""
    rng = random.Random(0)
    codes = []
    for _ in range(12):
        code, said, _ = server.run("phase", tmp_path, phase=PHASE, kill_at=rng.randint(5, 45))
        codes.append(code)
        if code == 0:
            break

    code, said, _ = server.run("phase", tmp_path, phase=PHASE)

    assert code == 0, said
    assert codes.count(-signal.SIGKILL) >= 2
    assert_same_phase(tmp_path, whole_phase)


def test_a_whole_recipe_killed_from_outside_ends_the_same(
    server: TrainingServer, ingredients: Path, whole_run: Path, tmp_path: Path
):
    folder = copy_ingredients(ingredients, tmp_path)
    for phase, lines in (("tune-text", 1), ("tune-text", 3), ("stage1", 3), ("stage2", 1), ("stage2", 3)):
        wanted = {"file": f"run/{phase}/metrics.jsonl", "lines": lines, "number": signal.SIGKILL}
        code, said, _ = server.run("command", folder, signal=wanted)
        assert code == -signal.SIGKILL, said

    code, said, _ = server.run("command", folder)

    assert code == 0, said
    assert_same_run(folder, whole_run)


def test_killed_while_a_model_is_saved_no_half_is_taken_for_whole(
    server: TrainingServer, ingredients: Path, whole_run: Path, tmp_path: Path
):
    """The specialist that was tuned, then the fused model: before and after it gets its name."""
    folder = copy_ingredients(ingredients, tmp_path)
    code, said, _ = server.run("command", copy_ingredients(ingredients, tmp_path / "counted"), kill_at=None)
    assert code == 0, said
    log = (tmp_path / "counted" / "events").read_text().splitlines()
    first_stage = [n for n, name in enumerate(log, start=1) if name == "before _step"][4]
    tuned = max(n for n in range(1, first_stage) if log[n - 1] == "before rename")
    for point in (tuned, tuned + 1):
        code, said, _ = server.run("command", folder, kill_at=point)
        assert code == -signal.SIGKILL, said
        exists = (folder / "run" / "specialists" / "text" / "config.json").exists()
        assert exists == (point == tuned + 1)
        if not exists:
            shutil.rmtree(folder / "run")  # so that the next run has the same events
    code, said, _ = server.run("command", folder, kill_at=None)
    assert code == 0, said
    shutil.rmtree(folder / "run" / "model")
    code, said, _events = server.run("command", folder, kill_at=None)
    log = (folder / "events").read_text().splitlines()
    saving = log.index("before put_in_place") + 1
    shutil.rmtree(folder / "run" / "model")

    code, said, _ = server.run("command", folder, kill_at=saving)

    assert code == -signal.SIGKILL, said
    assert not (folder / "run" / "model").exists()
    code, said, _ = server.run("command", folder)
    assert code == 0, said
    assert_same_run(folder, whole_run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_an_interrupt_saves_exits_130_and_goes_on_to_the_same_end(
    server: TrainingServer, ingredients: Path, whole_run: Path, tmp_path: Path, number: int
):
    folder = copy_ingredients(ingredients, tmp_path)
    wanted = {"file": "run/stage1/metrics.jsonl", "lines": 1, "number": int(number)}
    code, said, _ = server.run("command", folder, signal=wanted)
    assert code == 130, said
    assert "this step is finished and saved first" in said
    assert "Traceback" not in said
    steps = len(untimed_metrics(folder / "run" / "stage1" / "metrics.jsonl"))
    [saved] = list_checkpoints(folder / "run" / "stage1" / "checkpoints")
    assert saved.name == f"step-{steps:08d}"
    assert find_damage(saved) is None

    code, said, _ = server.run("command", folder)

    assert code == 0, said
    assert_same_run(folder, whole_run)


def test_an_interrupt_in_the_last_step_of_a_stage_is_heard(server: TrainingServer, whole_phase: Path, tmp_path: Path):
    """It must not be lost between two phases."""
    code, said, _ = server.run("interrupted_at_the_end", tmp_path, phase=PHASE)

    assert code == 99
    assert "KeyboardInterrupt" in said
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000004"]
    code, said, _ = server.run("phase", tmp_path, phase=PHASE)
    assert_same_phase(tmp_path, whole_phase)


@pytest.mark.parametrize("limit", [2_000, 20_000])
def test_where_files_cannot_grow_it_stops_in_one_line_and_goes_on_later(
    server: TrainingServer, ingredients: Path, whole_run: Path, tmp_path: Path, limit: int
):
    """As on a full disk: metrics, then a checkpoint, cannot be written."""
    folder = copy_ingredients(ingredients, tmp_path)
    wanted = {"file": "run/stage1/metrics.jsonl", "lines": 2, "number": signal.SIGKILL}
    server.run("command", folder, signal=wanted)  # there is something to go on from

    code, said, _ = server.run("command", folder, size_limit=limit)

    assert code == 1, said
    [line] = [line for line in said.splitlines() if line.startswith("ultrafuser: ")]
    assert "cannot write" in line
    assert "Traceback" not in said
    for phase in PHASES:
        checkpoints = list_checkpoints(folder / "run" / phase / "checkpoints")
        assert all(find_damage(path) is None for path in checkpoints)
    code, said, _ = server.run("command", folder)
    assert code == 0, said
    assert_same_run(folder, whole_run)


def test_a_second_run_repeats_no_step_and_is_quick(
    server: TrainingServer, ingredients: Path, whole_run: Path, tmp_path: Path
):
    folder = copy_ingredients(ingredients, tmp_path)
    shutil.copytree(whole_run / "run", folder / "run")
    began = time.monotonic()

    code, said, _ = server.run("command", folder, kill_at=None)

    assert code == 0, said
    assert "_step" not in (folder / "events").read_text()
    assert time.monotonic() - began < 20
    assert_same_run(folder, whole_run)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage1.learning_rate=1e-3", "stage1/checkpoints was made with other settings"),
        ("stage2.steps=5", "stage2/checkpoints was made with other settings"),
        ("specialists.text.tune.steps=6", "specialists/text was made with other settings (steps 4, not 6)"),
        ("specialists.text.template=plain", "(template 'ultralm', not 'plain')"),
        ("data.validation_fraction=0.4", "(validation_fraction 0.2, not 0.4)"),
    ],
)
def test_a_changed_recipe_is_refused_in_one_line(
    server: TrainingServer, ingredients: Path, whole_run: Path, tmp_path: Path, override: str, message: str
):
    folder = copy_ingredients(ingredients, tmp_path)
    shutil.copytree(whole_run / "run", folder / "run")
    recipe = (folder / "run" / "recipe.yaml").read_text()

    code, said, _ = server.run("command", folder, overrides=[override])

    assert code == 1, said
    assert message in " ".join(said.split("ultrafuser: ")[1].splitlines())
    assert (folder / "run" / "recipe.yaml").read_text() == recipe  # still the one that made what lies there


def test_the_fused_model_loads_and_answers(whole_run: Path):
    folder = whole_run / "run" / "model"

    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = FusedGenerator.from_pretrained(str(folder))
    [answer] = generator.generate([(Message("user", "t1?"),)], SamplingParams(max_tokens=4))

    assert model.names == list(DOMAINS)
    assert len(answer.gate_weights) == len(answer.token_ids)
    assert (folder / "recipe.yaml").read_text() == (whole_run / "run" / "recipe.yaml").read_text()


def test_a_tuned_specialist_is_an_ordinary_model_folder(whole_run: Path):
    specialist = whole_run / "run" / "specialists" / "text"

    tuned = AutoModelForCausalLM.from_pretrained(specialist)
    base = AutoModelForCausalLM.from_pretrained(whole_run / "text-base")

    assert type(tuned) is type(base)
    assert not torch.equal(tuned.get_output_embeddings().weight, base.get_output_embeddings().weight)
    assert json.loads((specialist / "tuned.json").read_text())["domains"] == ["text"]


def test_a_tuned_specialists_tokenizer_carries_the_template_it_was_tuned_in(whole_run: Path):
    tokenizer = AutoTokenizer.from_pretrained(whole_run / "run" / "specialists" / "text")

    assert tokenizer.chat_template == load_template("ultralm").source


@pytest.mark.parametrize(
    ("overrides", "phases"),
    [
        (["stage1=null"], {"tune-text", "stage2"}),
        (["stage2=null"], {"tune-text", "stage1"}),
        (["stage2=null", "specialists.text.tune=null"], {"stage1"}),
    ],
    ids=["direct training", "stage 1 only", "nothing tuned"],
)
def test_an_ablation_is_a_matter_of_the_recipe(
    server: TrainingServer, ingredients: Path, tmp_path: Path, overrides: list[str], phases: set[str]
):
    folder = copy_ingredients(ingredients, tmp_path)

    code, said, _ = server.run("command", folder, overrides=overrides)

    assert code == 0, said
    assert {path.parent.name for path in (folder / "run").glob("*/metrics.jsonl")} == phases
    assert (folder / "run" / "model" / "config.json").is_file()


def test_what_stands_where_the_model_will_be_is_found_before_anything_is_trained(tmp_path: Path):
    recipe = load_recipe(write_ingredients(tmp_path))
    (tmp_path / "run" / "model" / "notes").mkdir(parents=True)

    with pytest.raises(ModelError, match=r"model/notes is no part of a fused model: choose another folder"):
        Trainer(recipe).run()

    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model"]
