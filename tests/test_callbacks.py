"""Callbacks of the user's own: what they are told, how they stop training, and what happens when they fail."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from training_helpers import Observers, make_phase, untimed_metrics, write_ingredients
from ultrafuser.config.load import load_recipe
from ultrafuser.errors import ConfigError, DataError, TrainingError
from ultrafuser.train.callbacks import Callback, StopTraining, load_callbacks, name_callbacks
from ultrafuser.train.environment import note_start
from ultrafuser.train.loop import Loop
from ultrafuser.train.trainer import Trainer


class Diary(Callback):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def on_phase_begin(self, phase: Any, step: int) -> None:
        self.told.append(("begin", phase.name, step))

    def on_step(self, values: Any) -> None:
        self.told.append(("step", values["step"]))

    def on_validation(self, losses: Any) -> None:
        self.told.append(("validation", *sorted(losses)))

    def on_checkpoint(self, step: int, folder: Path) -> None:
        assert (folder / "MANIFEST.json").is_file()
        self.told.append(("checkpoint", step, folder.name))

    def on_phase_end(self, phase: Any) -> None:
        self.told.append(("end", phase.name))


def train(folder: Path, *callbacks: object, **options: Any) -> None:
    Loop(make_phase(folder, observers=Observers(callbacks=tuple(name_callbacks(callbacks))), **options)).run()


def test_a_callback_is_told_of_everything_in_order(tmp_path: Path):
    diary = Diary()

    train(tmp_path, diary, stage={"steps": 3})

    assert diary.told == [
        ("begin", "stage1", 0),
        ("step", 0),
        ("step", 1),
        ("validation", "code", "text"),
        ("checkpoint", 2, "step-00000002"),
        ("step", 2),
        ("validation", "code", "text"),
        ("checkpoint", 3, "step-00000003"),
        ("end", "stage1"),
    ]


def test_a_function_is_told_of_every_step_as_metrics_have_it(tmp_path: Path):
    told: list[dict[str, Any]] = []

    train(tmp_path, told.append)

    assert told == [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def stop_at(step: int, hook: str = "on_step") -> object:
    def stop(_: Any, *arguments: Any) -> None:
        values = arguments[0] if arguments else None
        if hook != "on_step" or values["step"] == step:
            raise StopTraining("good enough")

    return type("Stopper", (), {hook: stop})


@pytest.mark.parametrize(("hook", "stops_after"), [("on_phase_begin", 1), ("on_step", 3), ("on_validation", 2)])
def test_a_callback_that_asks_to_stop_leaves_a_checkpoint_to_go_on_from(tmp_path: Path, hook: str, stops_after: int):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(whole)

    with pytest.raises(TrainingError, match=rf"stopped after step {stops_after} of 4 by the callback .*: good enough"):
        train(stopped, stop_at(2, hook))

    assert (stopped / "checkpoints" / f"step-{stops_after:08d}" / "MANIFEST.json").is_file()
    diary = Diary()
    train(stopped, diary)
    assert diary.told[0] == ("begin", "stage1", stops_after)
    assert untimed_metrics(stopped / "metrics.jsonl") == untimed_metrics(whole / "metrics.jsonl")


def test_a_wish_at_the_end_of_a_phase_stops_before_the_next_one(tmp_path: Path):
    with pytest.raises(TrainingError, match="stopped after step 4 of 4"):
        train(tmp_path, stop_at(0, "on_phase_end"))

    train(tmp_path)  # is at its end


def test_an_error_in_a_callback_keeps_its_traceback_and_the_last_checkpoint(tmp_path: Path):
    def watch(values: Any) -> None:
        if values["step"] == 2:
            raise KeyError("temperature")

    with pytest.raises(KeyError, match="temperature") as caught:
        train(tmp_path, watch)

    assert caught.traceback[-1].name == "watch"
    (note,) = caught.value.__notes__
    assert note.endswith("watch in on_step; the last checkpoint stands")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    train(tmp_path)
    assert len(untimed_metrics(tmp_path / "metrics.jsonl")) == 4


class Misspelt:
    def on_steps(self, values: Any) -> None: ...


class Needy:
    def __init__(self, path: str) -> None: ...


@pytest.mark.parametrize(
    ("callback", "problem"),
    [(Misspelt, "has on_steps: what training calls is"), (Needy, "made without arguments"), (3, "has nothing")],
    ids=["misspelt", "needs arguments", "no callback"],
)
def test_what_is_never_called_is_refused(callback: object, problem: str):
    with pytest.raises(ConfigError, match=problem):
        name_callbacks([callback])


# --- from a recipe ---------------------------------------------------------------------------------------------------


@pytest.fixture
def users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a module of the user's."""
    (tmp_path / "my_watch.py").write_text(
        "seen = []\n\n\nclass Watch:\n    def on_step(self, values):\n        seen.append(values['loss'])\n\n\n"
        "def note(values):\n    seen.append(values['step'])\n\n\nnumber = 3\n"
    )
    (tmp_path / "my_broken.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("my_watch", "my_broken"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("my_watch", "write module:name"),
        ("my_watch:", "write module:name"),
        ("no_such_module:watch", "there is no module 'no_such_module'"),
        ("my_watch:gone", "my_watch has no 'gone'"),
        ("my_watch:number", "has nothing that can be called"),
    ],
)
@pytest.mark.usefixtures("users_folder")
def test_a_callback_that_is_none_is_one_line(spec: str, problem: str):
    with pytest.raises(ConfigError, match=problem):
        load_callbacks([spec])


@pytest.mark.usefixtures("users_folder")
def test_a_module_that_cannot_be_imported_keeps_its_own_error():
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        load_callbacks(["my_broken:watch"])


def test_a_recipe_names_callbacks_and_python_adds_some_and_every_start_is_noted(users_folder: Path):
    recipe_file = write_ingredients(users_folder)
    overrides = ["stage2=null", "specialists.text.tune=null", "train.callbacks=[my_watch:Watch, my_watch:note]"]
    recipe = load_recipe(recipe_file, [*overrides, "stage1.steps=2"])
    diary = Diary()

    for _ in range(2):  # the second finds everything done
        trainer = Trainer(recipe, callbacks=[diary])
        trainer.recipe_file = recipe_file
        trainer.run()

    lines = untimed_metrics(users_folder / "run" / "stage1" / "metrics.jsonl")
    assert sys.modules["my_watch"].seen == [lines[0]["loss"], 0, lines[1]["loss"], 1]
    assert [told for told in diary.told if told[0] in ("begin", "end")] == [("begin", "stage1", 0), ("end", "stage1")]
    starts = json.loads((users_folder / "run" / "environment.json").read_text())
    assert len(starts) == 2
    for start in starts:
        assert start["recipe"] == str(recipe_file)
        assert {"python", "torch", "transformers", "ultrafuser", "peft"} <= set(start["versions"])
        assert {"date", "command", "hardware", "host", "devices", "processes", "git"} <= set(start)
        assert start["git"]["recipe"] is None  # a temporary folder is in no repository


def test_reading_a_recipe_runs_none_of_its_callbacks(users_folder: Path):
    load_recipe(write_ingredients(users_folder), ["train.callbacks=[my_watch:Watch]"])

    assert "my_watch" not in sys.modules


# --- where a run comes from ------------------------------------------------------------------------------------------


def test_a_start_notes_commit_and_changes_of_the_recipes_repository(tmp_path: Path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=A", "-c", "user.email=a@example.org"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: a\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()

    note_start(tmp_path / "run", recipe_file=recipe)
    recipe.write_text("name: b\n")
    note_start(tmp_path / "run", recipe_file=recipe)

    first, second = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert first["git"]["recipe"] == {"commit": commit, "dirty": False}
    assert second["git"]["recipe"] == {"commit": commit, "dirty": True}


@pytest.mark.parametrize("content", ["", "{}", "[{"])
def test_a_file_that_is_no_list_of_starts_is_left_as_it_is(tmp_path: Path, content: str):
    (tmp_path / "environment.json").write_text(content)

    with pytest.raises(DataError, match=r"is no list of starts .* move it away"):
        note_start(tmp_path)

    assert (tmp_path / "environment.json").read_text() == content
