"""Stage 1 from hidden states on disk learns what live training learns, with one specialist in memory."""

import gc
import json
import logging
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaModel

from training_helpers import (
    DOMAINS,
    TEMPLATES,
    TOKENIZER,
    TrainingServer,
    make_fused,
    make_phase,
    make_specialist,
    training_server,
    untimed_metrics,
    write_ingredients,
)
from ultrafuser.alignment.collate import micro_batches
from ultrafuser.alignment.encode import EncodedRecord, EncodedTurn
from ultrafuser.config.load import load_recipe
from ultrafuser.config.training import Stage1CacheConfig
from ultrafuser.errors import ConfigError, ModelError, TrainingError
from ultrafuser.model.checkpoint import save_fused
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.lean import SpecialistLoader
from ultrafuser.train.hidden import fill
from ultrafuser.train.hidden.fill import SpecialistsInMemory
from ultrafuser.train.hidden.loop import CachedLoop
from ultrafuser.train.hidden.store import line_up, view_of
from ultrafuser.train.loop import Loop
from ultrafuser.train.phase import Phase
from ultrafuser.train.trainer import Trainer

STAGE = {"steps": 6, "composed_share": 0.25}


def cached_loop(phase: Phase, folder: Path, **cache: Any) -> CachedLoop:
    settings = Stage1CacheConfig.model_validate({"mode": "window", "disk_gb": 1.0, **cache})
    return CachedLoop(phase, SpecialistsInMemory(phase.model), settings, folder)


def train_both(tmp_path: Path, make: Any = make_fused, stage: Mapping[str, Any] = STAGE, **cache: Any) -> Any:
    """The gate after live training and after training from disk, with the metrics of both."""
    results = []
    for kind in ("live", "cached"):
        model = make()
        phase = make_phase(tmp_path / kind, model=model, stage=stage)
        if kind == "live":
            Loop(phase).run()
        else:
            cached_loop(phase, tmp_path / "hidden", **cache).run()
        results.append((model.fusion_gate.state_dict(), untimed_metrics(tmp_path / kind / "metrics.jsonl")))
    return results


def assert_same_training(live: Any, cached: Any) -> None:
    """Every loss to fp32 rounding; weights, which Adam moves by 1e-2 a step whatever their gradient, to 1e-4.

    But for the bias of the score: it is the same for all specialists, so its gradient is rounding and nothing else.
    """
    for name, value in live[0].items():
        if name != "layers.2.bias":
            torch.testing.assert_close(cached[0][name], value, rtol=1e-5, atol=1e-4)
    for mine, theirs in zip(cached[1], live[1], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert mine["tokens"] == theirs["tokens"]
        assert mine["loss_per_domain"] == pytest.approx(theirs["loss_per_domain"], rel=1e-6)
        assert mine.get("validation") == (
            pytest.approx(theirs["validation"], rel=1e-6) if "validation" in theirs else None
        )


def make_unequal() -> FusedForCausalLM:
    specialists = {"text": make_specialist(0), "code": make_specialist(1, hidden_size=24)}
    return FusedForCausalLM.from_specialists(specialists, templates=TEMPLATES, tokenizer=TOKENIZER, gate_hidden_size=8)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by a number of records with every forward pass of a specialist."""
    seen: list[int] = []
    run = fill.run_specialist

    def counted(specialist: Any, records: Any, **options: Any) -> Any:
        seen.append(len(records))
        return run(specialist, records, **options)

    monkeypatch.setattr(fill, "run_specialist", counted)
    return seen


@pytest.mark.parametrize("mode", ["window", "full"])
def test_the_gate_learns_what_it_learns_live(tmp_path: Path, mode: str):
    """Composed records among them; metrics and validation, too."""
    live, cached = train_both(tmp_path, mode=mode)

    assert_same_training(live, cached)


def test_hidden_sizes_may_differ(tmp_path: Path):
    assert_same_training(*train_both(tmp_path, make=make_unequal))


def test_one_weight_for_a_whole_response_is_held_from_disk_too(tmp_path: Path):
    assert_same_training(*train_both(tmp_path, make=lambda: make_fused(granularity="prompt")))


@pytest.mark.parametrize("space", ["logprobs", "probs"])
def test_other_fusion_spaces_are_those_of_live_training(tmp_path: Path, space: str):
    assert_same_training(*train_both(tmp_path, make=lambda: make_fused(fusion_space=space)))


@pytest.mark.parametrize("position", [0, 1])
def test_records_are_lined_up_as_their_views_are_run(position: int):
    drawn = torch.Generator().manual_seed(position)

    def ids() -> tuple[int, ...]:
        return tuple(range(int(torch.randint(1, 9, (), generator=drawn))))

    records = [
        EncodedRecord(
            str(name), "text", tuple(EncodedTurn((ids(), ids()), ids(), (False, True)) for _ in range(1 + name % 3))
        )
        for name in range(60)
    ]

    lined_up = [record.id for record in line_up(records, position)]

    views = [view_of(record, position) for record in records]
    assert lined_up == [view.id for piece in micro_batches(views, max_columns=64) for view in piece]
    assert lined_up != [record.id for record in line_up(records, 1 - position)]


def test_a_second_run_of_another_gate_and_rate_needs_no_forward_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It learns what that gate learns live."""
    cached_loop(make_phase(tmp_path / "first", stage=STAGE), tmp_path / "hidden").run()
    runs = count_runs(monkeypatch)

    live, cached = train_both(
        tmp_path, make=lambda: make_fused(gate_hidden_size=12), stage={**STAGE, "learning_rate": 3e-3}
    )

    assert runs == []
    assert_same_training(live, cached)


def test_a_longer_run_makes_only_the_windows_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ultrafuser.train.hidden.plan.FULL_WINDOW_BYTES", 8_000)
    stage = {"steps": 8, "schedule": "constant"}
    short = cached_loop(make_phase(tmp_path / "short", stage={**stage, "steps": 6}), tmp_path / "hidden", mode="full")
    short.run()
    before = files(tmp_path / "hidden")

    cached_loop(make_phase(tmp_path / "long", stage=stage), tmp_path / "hidden", mode="full").run()

    assert len(short.make_plan().windows) > 1
    assert set(before) < set(files(tmp_path / "hidden"))


def test_each_record_of_a_window_is_run_once_however_often_it_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = count_runs(monkeypatch)
    phase = make_phase(tmp_path, stage={"steps": 20})  # 40 draws of 6 and of 5 records

    cached_loop(phase, tmp_path / "hidden").run()

    assert sum(runs) == 2 * (11 + 4)  # two specialists; four validation records


def test_windows_rotate_within_the_budget_and_change_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    budget_bytes, held = 11_000, []
    run = fill.run_specialist

    def measured(*args: Any, **options: Any) -> Any:
        held.append(sum(path.stat().st_size - 1_000 for path in (tmp_path / "hidden").glob("*.safetensors")))
        return run(*args, **options)

    monkeypatch.setattr(fill, "run_specialist", measured)

    live, cached = train_both(tmp_path, stage={**STAGE, "steps": 10}, disk_gb=budget_bytes / 1e9)

    assert_same_training(live, cached)
    assert len({name.split("-", 1)[1] for name in files(tmp_path / "hidden")}) > 1
    labels = {name.split("-")[2] for name in files(tmp_path / "hidden")}
    assert "000000" not in labels  # the first window made room
    assert max(held) <= budget_bytes


def test_the_plan_is_told_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cached_loop(make_phase(tmp_path, stage=STAGE), tmp_path / "hidden").run()

    said = capsys.readouterr().err
    plan, rest = said.split("hidden states of text, validation", 1)
    assert "1 window of steps, 0.000 GB in all" in plan
    assert "4 of 4 files are to be made: 2 loads of a specialist, about 0.00 h of forward passes" in plan
    assert "steps-000000-000005: 17 records" in plan
    assert "stage1: step" in rest


def test_a_budget_that_no_step_fits_is_refused(tmp_path: Path):
    loop = cached_loop(make_phase(tmp_path), tmp_path / "hidden", disk_gb=1e-6)

    with pytest.raises(ConfigError, match=r"disk_gb 1e-06 is too small for the validation records and step 0"):
        loop.run()


def test_keeping_all_within_too_little_is_refused(tmp_path: Path):
    loop = cached_loop(make_phase(tmp_path, stage=STAGE), tmp_path / "hidden", mode="full", disk_gb=2e-5)

    with pytest.raises(ConfigError, match=r"too small to keep all hidden states: they take 0\.000034 GB"):
        loop.run()


@pytest.mark.parametrize("what", ["weights", "template", "records"])
def test_hidden_states_of_something_else_are_not_used_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, what: str
):
    cached_loop(make_phase(tmp_path / "first", stage=STAGE), tmp_path / "hidden").run()
    before = files(tmp_path / "hidden")
    runs = count_runs(monkeypatch)

    def make() -> FusedForCausalLM:
        specialists = {name: make_specialist(seed) for seed, name in enumerate(DOMAINS)}
        if what == "weights":
            specialists["code"] = make_specialist(5)
        templates = {**TEMPLATES, "code": "wizardmath" if what == "template" else TEMPLATES["code"]}
        return FusedForCausalLM.from_specialists(
            specialists, templates=templates, tokenizer=TOKENIZER, gate_hidden_size=8
        )

    seed = 8 if what == "records" else 7
    with caplog.at_level(logging.WARNING):
        cached_loop(make_phase(tmp_path / "second", model=make(), stage=STAGE, seed=seed), tmp_path / "hidden").run()

    assert runs
    assert f"are of other {what}" in caplog.text
    assert set(before) < set(files(tmp_path / "hidden"))
    if what != "records":
        assert "hidden states of text" not in caplog.text  # nothing of it has changed


def test_a_damaged_file_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    cached_loop(make_phase(tmp_path / "first", stage=STAGE), tmp_path / "hidden").run()
    [path] = (tmp_path / "hidden").glob("text-steps-*")
    content = path.read_bytes()
    path.write_bytes(content[:-100])

    with caplog.at_level(logging.WARNING):
        cached_loop(make_phase(tmp_path / "second", stage=STAGE), tmp_path / "hidden").run()

    assert "made anew" in caplog.text
    assert path.read_bytes() == content


def test_a_file_is_an_ordinary_safetensors_file(tmp_path: Path):
    loop = cached_loop(make_phase(tmp_path, stage=STAGE), tmp_path / "hidden")
    loop.run()

    [path] = (tmp_path / "hidden").glob("code-steps-*")
    tensors = load_file(path)

    assert tensors["hidden"].shape == (loop.make_plan().windows[0].num_tokens, 16)


def test_dropout_is_refused(tmp_path: Path):
    """Live training draws it anew in every step."""
    phase = make_phase(tmp_path, model=make_fused(dropout=0.2))

    with pytest.raises(TrainingError, match=r"'text' has dropout \(attention_dropout 0\.2\)"):
        cached_loop(phase, tmp_path / "hidden")


def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path: Path):
    (tmp_path / "file").touch()

    with pytest.raises(TrainingError, match=r"cannot write hidden states to .*: Not a directory") as caught:
        cached_loop(make_phase(tmp_path), tmp_path / "file" / "hidden")

    assert "\n" not in str(caught.value)


def test_a_disk_without_room_is_refused_before_a_specialist_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = count_runs(monkeypatch)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())

    with pytest.raises(TrainingError, match=r"has 0\.000 GB left, but the next hidden states take"):
        cached_loop(make_phase(tmp_path), tmp_path / "hidden").run()

    assert runs == []


@pytest.fixture(scope="module")
def server() -> Iterator[TrainingServer]:
    with training_server() as running:
        yield running


CACHE = ["train.stage1_cache={mode: window, disk_gb: 1}", "stage1.steps=6", "specialists.text.tune=null"]
LIVE = ["stage1.steps=6", "specialists.text.tune=null"]


@pytest.fixture(scope="module")
def live_run(server: TrainingServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live")
    write_ingredients(folder)
    code, said, _ = server.run("command", folder, overrides=LIVE)
    assert code == 0, said
    return folder


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    """All weights but the bias of the score, whose gradient is rounding alone."""
    state = AutoModelForCausalLM.from_pretrained(folder / "run" / "model").state_dict()
    return {name: value for name, value in state.items() if name != "fusion_gate.layers.2.bias"}


def assert_same_end(folder: Path, live: Path) -> None:
    """Both stages: parameters to rounding, as Adam enlarges it, and every loss."""
    expected = final_state(live)
    for name, value in final_state(folder).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=5e-4)
    for stage in ("stage1", "stage2"):
        mine, theirs = (untimed_metrics(f / "run" / stage / "metrics.jsonl") for f in (folder, live))
        assert [line["loss"] for line in mine] == pytest.approx([line["loss"] for line in theirs], rel=1e-5)


def test_a_recipe_with_a_cache_ends_where_live_training_ends(server: TrainingServer, live_run: Path, tmp_path: Path):
    write_ingredients(tmp_path)

    code, said, _ = server.run("command", tmp_path, overrides=CACHE)

    assert code == 0, said
    assert "hidden states of stage 1 in" in said
    assert_same_end(tmp_path, live_run)


def test_killed_in_the_middle_of_a_window_it_goes_on_without_a_forward_pass(
    server: TrainingServer, live_run: Path, tmp_path: Path
):
    write_ingredients(tmp_path)
    wanted = {"file": "run/stage1/metrics.jsonl", "lines": 3, "number": int(signal.SIGKILL)}
    code, said, _ = server.run("command", tmp_path, overrides=CACHE, signal=wanted)
    assert code == -signal.SIGKILL, said

    code, said, _ = server.run("command", tmp_path, overrides=CACHE)

    assert code == 0, said
    assert "all files are there: no forward pass" in said
    assert_same_end(tmp_path, live_run)


@pytest.mark.slow
def test_killed_while_files_are_made_it_keeps_the_whole_ones(server: TrainingServer, live_run: Path, tmp_path: Path):
    """At every rename of a file of hidden states, before it and after it."""
    write_ingredients(tmp_path / "counted")
    code, said, _ = server.run("command", tmp_path / "counted", overrides=CACHE, kill_at=None)
    assert code == 0, said
    log = (tmp_path / "counted" / "events").read_text().splitlines()
    first_step = log.index("before _step")
    points = [number for number, name in enumerate(log[:first_step], start=1) if name.endswith(" rename")][-8:]
    whole = []
    write_ingredients(tmp_path)
    for point in points[:2]:
        code, said, _ = server.run("command", tmp_path, overrides=CACHE, kill_at=point)
        assert code == -signal.SIGKILL, said
        whole.append(len(files(tmp_path / "run" / "hidden")))

    code, said, _ = server.run("command", tmp_path, overrides=CACHE)

    assert code == 0, said
    assert whole == sorted(whole)
    assert whole[-1] > 0
    assert not list((tmp_path / "run" / "hidden").glob(".*"))
    assert_same_end(tmp_path, live_run)


def test_where_files_cannot_grow_it_stops_in_one_line_and_goes_on_later(
    server: TrainingServer, live_run: Path, tmp_path: Path
):
    """As on a full disk: the validation file fits, the window's does not."""
    write_ingredients(tmp_path)

    code, said, _ = server.run("command", tmp_path, overrides=CACHE, size_limit=9_000)

    assert code == 1, said
    [line] = [line for line in said.splitlines() if line.startswith("ultrafuser: ")]
    assert "cannot write hidden states to" in line
    assert "Traceback" not in said
    assert [name.split("-")[1] for name in files(tmp_path / "run" / "hidden")] == ["validation"]
    code, said, _ = server.run("command", tmp_path, overrides=CACHE)
    assert code == 0, said
    assert_same_end(tmp_path, live_run)


@pytest.mark.slow
def test_without_stage_2_the_model_is_a_gate_that_refers_to_its_specialists(server: TrainingServer, tmp_path: Path):
    """So that saving it, too, needs one specialist in memory."""
    write_ingredients(tmp_path)
    live = tmp_path / "live"
    write_ingredients(live)
    code, said, _ = server.run("command", live, overrides=[*LIVE, "stage2=null"])
    assert code == 0, said

    code, said, _ = server.run("command", tmp_path, overrides=[*CACHE, "stage2=null"])

    assert code == 0, said
    assert (tmp_path / "run" / "model" / "gate.safetensors").is_file()
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["gate_only"]
    expected = final_state(live)
    for name, value in final_state(tmp_path).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


def test_a_cache_for_a_stage_that_trains_specialists_is_refused(server: TrainingServer, tmp_path: Path):
    write_ingredients(tmp_path)

    code, said, _ = server.run("command", tmp_path, overrides=[*CACHE, "stage1.train_specialists=true"])

    assert code == 1
    assert "stage1.train_specialists is true" in " ".join(said.split())


def test_no_two_backbones_are_ever_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Counted whenever a specialist was loaded, which is when most are there."""
    recipe = load_recipe(write_ingredients(tmp_path), [*CACHE, "stage2=null"])
    gc.collect()
    before = {id(thing) for thing in gc.get_objects() if isinstance(thing, LlamaModel)}
    counts = []
    load = SpecialistLoader.load

    def counted(self: SpecialistLoader, name: str) -> Any:
        specialist = load(self, name)
        there = [thing for thing in gc.get_objects() if isinstance(thing, LlamaModel) and id(thing) not in before]
        counts.append(sum(next(backbone.parameters()).device.type != "meta" for backbone in there))
        return specialist

    monkeypatch.setattr(SpecialistLoader, "load", counted)

    Trainer(recipe).run()

    assert counts == [1] * 4  # for its head, and for its hidden states


def test_weights_replaced_during_a_run_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = load_recipe(write_ingredients(tmp_path), CACHE)
    begin = CachedLoop._begin

    def replaced(self: CachedLoop, step: int) -> None:
        make_specialist(9).save_pretrained(tmp_path / "code-base")
        begin(self, step)

    monkeypatch.setattr(CachedLoop, "_begin", replaced)

    with pytest.raises(ModelError, match=r"'code' in .*code-base were replaced during the run"):
        Trainer(recipe).run()


def test_a_model_without_backbones_is_not_saved_as_if_whole(tmp_path: Path):
    recipe = load_recipe(write_ingredients(tmp_path), [*CACHE, "stage1.steps=1"])
    trainer = Trainer(recipe)
    assert recipe.stage1 is not None
    lean = trainer.run_stage1_lean(recipe.specialists, recipe.stage1)

    with pytest.raises(ModelError, match="gate_only=True"):
        save_fused(lean, tmp_path / "model")
