"""`ultrafuser synthesize` from the outside: a run against a real endpoint, and what the user sees on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from synthesis_endpoint import Endpoint, serving
from ultrafuser.cli.main import app
from ultrafuser.data.records import read_records
from ultrafuser.errors import SynthesisError, UltrafuserError
from ultrafuser.synthesis.load import load_synthesis
from ultrafuser.synthesis.pipeline import plan_domains
from ultrafuser.synthesis.scaffold import new_domain

KEY = "sk-very-secret-8c1f"
Command = Callable[..., Result]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with serving(key=KEY) as running:
        yield running


@pytest.fixture
def recipe(tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TEST_KEY", KEY)
    return write_recipe(tmp_path, endpoint.url)


def write_recipe(folder: Path, url: str, **more: Any) -> Path:
    settings: dict[str, Any] = {"meta_topics": 2, "sub_topics": 4, "records": 12, "margin": 1.5}
    settings["gates"] = {"responses": {"truncated": {"sentences": False}}}  # the script's prose ends anywhere
    tree = {
        "name": "small",
        "folder": str(folder / "run"),
        "endpoints": {"writer": {"url": url, "model": "scripted", "key_variable": "TEST_KEY", "licence": "mit"}},
        "domains": {"cooking": {"settings": settings}},
        "export": {"validation_fraction": 0.25},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(tree | more), encoding="utf-8")
    return path


@pytest.fixture
def command() -> Command:
    """Calls `ultrafuser synthesize` with arguments; an error of ours is raised."""

    def call(*arguments: str | Path) -> Result:
        result = CliRunner().invoke(app, ["synthesize", *map(str, arguments)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


def test_from_recipe_to_data_set(recipe: Path, command: Command, tmp_path: Path):
    """The whole way: estimate, run, status, numbers, export; what comes out is a data set."""
    estimate = command(recipe, "--dry-run")
    assert "responses" in estimate.stdout
    assert not (tmp_path / "run").exists()

    first = command(recipe)
    assert "cooking: 12 answers kept" in first.stdout
    again = command("run", recipe)
    assert "0 requests in" in again.stdout

    assert "responses" in command("status", recipe).stdout
    assert "| cooking | 12 | 2 / 4 |" in command("stats", recipe, "--sample", "10").stdout
    assert (tmp_path / "run" / "stats" / "map.png").is_file()

    exported = command("export", recipe, "--to", tmp_path / "set")
    assert "12  records in all" in exported.stdout
    names = [path for path in (tmp_path / "set" / "data").iterdir() if path.suffix == ".jsonl"]
    assert sum(len(list(read_records(path, domain_field="domain"))) for path in names) == 12


def test_a_run_that_keeps_nothing_says_so(recipe: Path, command: Command):
    """Gates that no topic passes leave nothing to ask for, which is no success."""
    gates = "domains.cooking.settings.gates.meta_topics.length={min_words: 50}"

    with pytest.raises(SynthesisError, match="'cooking' has come to its end without one answer"):
        command(recipe, "--set", gates)


def test_a_key_is_nowhere_but_in_the_environment(recipe: Path, command: Command, tmp_path: Path):
    command(recipe)
    command("review", recipe)
    command("stats", recipe)
    command("export", recipe)

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path.name for path in files if KEY.encode() in path.read_bytes()] == []


def test_a_run_waits_for_a_person_and_goes_on_without_what_was_struck(
    endpoint: Endpoint, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TEST_KEY", KEY)
    recipe = write_recipe(tmp_path, endpoint.url, review_after=["sub_topics"])

    waiting = command(recipe)
    assert "waits until a person has looked at its sub_topics" in waiting.stdout
    page = Path(command("review", recipe, "--stage", "sub_topics").stdout.strip())
    keys = [line.split('data-key="')[1].split('"')[0] for line in page.read_text().splitlines() if "data-key" in line]
    assert len(keys) == 4

    verdicts = {
        "synthesis": "small",
        "verdicts": [{"item": keys[0], "verdict": "strike", "note": "no"}],
        "approved": [{"domain": "cooking", "stage": "sub_topics"}],
    }
    (tmp_path / "verdicts.json").write_text(json.dumps(verdicts), encoding="utf-8")
    applied = command("review", recipe, "--apply", tmp_path / "verdicts.json")
    assert "struck 1 (1 items gone); approved stages: sub_topics of cooking" in applied.stdout
    done = command(recipe)
    assert "12 answers kept" in done.stdout

    command("export", recipe, "--to", tmp_path / "set", "--formats", "jsonl")
    rows = [json.loads(line) for path in (tmp_path / "set" / "data").iterdir() for line in path.open(encoding="utf-8")]
    assert len({row["sub_topic"] for row in rows}) == 3


def test_a_stage_is_accepted_as_it_is(
    endpoint: Endpoint, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TEST_KEY", KEY)
    recipe = write_recipe(tmp_path, endpoint.url, review_after=["meta_topics"])
    command(recipe)
    command("review", recipe, "--accept-stage", "meta_topics")

    assert "12 answers kept" in command(recipe).stdout


def test_from_a_stage_on_everything_is_read_anew_without_a_call(recipe: Path, command: Command, endpoint: Endpoint):
    command(recipe)
    before = endpoint.calls.total

    again = command(recipe, "--from", "instructions")

    assert "cooking: 12 answers kept" in again.stdout
    assert endpoint.calls.total == before


def test_talk_goes_to_stderr_and_results_to_stdout(recipe: Path, command: Command):
    result = command(recipe)

    assert result.stdout.startswith("cooking: 12 answers kept")
    assert "requests/s" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "no recipe at nowhere.yaml"),
        (["{recipe}", "--set", "limits.max_cots=5"], "limits.max_cots: Extra inputs"),
        (["{recipe}", "--set", "review_after=[topics]"], "there is no stage 'topics'"),
        (["{recipe}", "--from", "topics"], "there is no such stage"),
        (["{recipe}", "--only", "cooking,law"], "the recipe has no such domain; known: cooking"),
        (["status", "{recipe}"], "nothing was made yet"),
        (["export", "{recipe}"], "nothing was made yet"),
        (["review", "{recipe}", "--accept-stage", "responses"], "'responses' is none that is reviewed"),
        (["review", "{recipe}", "--apply", "nowhere.json"], "cannot read nowhere.json"),
        (["domain", "law", "--like", "poetry"], "no domain 'poetry' comes with the package"),
        (["domain", "My Law"], "'My Law' is no name of a domain"),
    ],
)
def test_a_mistake_is_one_clear_line(recipe: Path, command: Command, arguments: list[str], message: str):
    with pytest.raises(UltrafuserError) as caught:
        command(*(argument.replace("{recipe}", str(recipe)) for argument in arguments))

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_key_is_one_line_and_an_exit_code(recipe: Path):
    environment = os.environ | {"TEST_KEY": "sk-wrong-key-77"}
    command = [sys.executable, "-m", "ultrafuser", "synthesize", str(recipe)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("ultrafuser: ")
    assert "TEST_KEY" in result.stderr
    assert "sk-wrong" not in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_help_shows_every_command_and_the_first_word_may_be_a_recipe(command: Command):
    shown = command("--help").stdout

    for name in ("run", "status", "review", "export", "stats", "domain"):
        assert f"  {name} " in shown
    assert "--dry-run" in command("some.yaml", "--help").stdout
    assert "--dry-run" in command("--set", "seed=1", "some.yaml", "--help").stdout
    assert command().exit_code == 2


def test_a_copied_domain_can_be_edited_and_run(
    endpoint: Endpoint, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TEST_KEY", KEY)
    folder = new_domain("law", like="text", to=tmp_path / "domains")
    prompts = {path.stem for path in folder.glob("*.md")}
    assert {"meta_topics", "instructions", "responses", "evolve_deepen"} <= prompts
    tree = yaml.safe_load((folder / "domain.yaml").read_text(encoding="utf-8"))
    tree |= {"title": "law", "meta_topics": 2, "sub_topics": 2, "records": 4}
    (folder / "domain.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    (folder / "responses.md").write_text("You are a lawyer.\n", encoding="utf-8")

    recipe = write_recipe(tmp_path, endpoint.url, domains={"law": {"folder": "domains/law"}})
    assert "law: 4 answers kept" in command(recipe).stdout


def test_the_papers_recipe_holds_the_papers_counts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ULTRACHAT_URL", "http://localhost:1/v1")
    monkeypatch.setenv("ULTRACHAT_MODEL", "any")
    loaded = load_synthesis(Path(__file__).parent.parent / "recipes" / "ultrachat2.yaml")

    counts = {
        name: tuple(config.settings[key] for key in ("meta_topics", "sub_topics", "records", "complicated"))
        for name, config in loaded.domains.items()
    }
    assert counts == {
        "text": (30, 1100, 100_000, 0.3),
        "code": (21, 407, 100_000, 0.3),
        "math": (21, 80, 110_000, 0.3),
    }


@pytest.mark.parametrize("name", ["ultrachat2", "cooking", "smollm2-cooking"])
def test_every_recipe_that_we_ship_can_be_planned(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ULTRACHAT_URL", "http://localhost:1/v1")
    monkeypatch.setenv("ULTRACHAT_MODEL", "any")
    loaded = load_synthesis(Path(__file__).parent.parent / "recipes" / f"{name}.yaml")

    assert [plan.name for plan in plan_domains(loaded)] == list(loaded.domains)
