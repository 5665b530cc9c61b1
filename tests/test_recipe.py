"""Recipes: the paper's defaults, overrides, paths and variables, and one clear line for each mistake."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ultrafuser.config.load import apply_override, dump_recipe, load_recipe, parse_recipe
from ultrafuser.config.recipe import Recipe
from ultrafuser.config.training import StageConfig
from ultrafuser.errors import ConfigError
from ultrafuser.synthesis.domain import load_domain
from ultrafuser.synthesis.load import load_synthesis

MINIMAL = """
name: tiny
specialists:
  text: {model: a/text}
  code: {model: a/code}
data:
  domains:
    text: {sources: [{path: text.jsonl}]}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipes" / "tiny.yaml"
    path.parent.mkdir()
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def test_the_defaults_are_the_papers():
    """Algorithm 1 and Appendix B."""
    recipe = parse_recipe({"name": "paper", "specialists": {"text": {"model": "a/text"}}})

    assert recipe.stage1 == StageConfig(
        steps=400, learning_rate=2e-5, records_per_domain=64, schedule="cosine", train_specialists=False
    )
    assert (recipe.gate.hidden_size, recipe.gate.num_layers, recipe.gate.granularity) == (512, 2, "token")
    assert (recipe.fusion.space, recipe.fusion.weighting) == ("logits", "gate")
    assert recipe.train.sampler == "balanced"
    assert recipe.stage1.composed_share == recipe.stage1.gate_entropy == 0
    assert recipe.stage2 is None


def test_the_order_of_the_specialists_is_kept(recipe_file: Path):
    assert list(load_recipe(recipe_file).specialists) == ["text", "code"]


def test_a_dumped_recipe_loads_to_the_same(recipe_file: Path, tmp_path: Path):
    settings = [
        "stage2.train_specialists=true",
        "stage2.learning_rate=2e-5",
        f"output={tmp_path / 'out'}",
        "stage1=null",
    ]
    recipe = load_recipe(recipe_file, settings)

    (tmp_path / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8")

    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert yaml.safe_load(dump_recipe(recipe))["gate"]["hidden_size"] == 512  # every default is written out


def test_a_recipe_cannot_be_changed():
    recipe = parse_recipe({"name": "a", "specialists": {"text": {"model": "a/text"}}})

    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "where", "value"),
    [
        ("stage1.steps=20", ("stage1", "steps"), 20),
        ("stage1.learning_rate=2e-5", ("stage1", "learning_rate"), 2e-5),
        ("stage1.learning_rate=2.5E-5", ("stage1", "learning_rate"), 2.5e-5),
        ("stage1.steps=1e3", ("stage1", "steps"), 1000),
        ("stage1.betas=[0.9, 0.95]", ("stage1", "betas"), (0.9, 0.95)),
        ("stage1.max_grad_norm=null", ("stage1", "max_grad_norm"), None),
        ("stage1=null", ("stage1",), None),
        ("stage1.train_specialists=true", ("stage1", "train_specialists"), True),
        ("stage2.steps=7", ("stage2", "steps"), 7),  # a section that the file does not have
        ("train.device=cpu", ("train", "device"), "cpu"),
        ("specialists.text.revision=1234e56", ("specialists", "text", "revision"), "1234e56"),  # a commit, no number
        ("specialists.text.revision=a=b", ("specialists", "text", "revision"), "a=b"),
        ("specialists.math={model: a/math}", ("specialists", "math", "model"), "a/math"),
    ],
)
def test_an_override_sets_one_value(recipe_file: Path, override: str, where: tuple[str, ...], value: Any):
    found: Any = load_recipe(recipe_file, [override])
    for part in where:
        found = found[part] if isinstance(found, dict) else getattr(found, part)

    assert found == value
    assert type(found) is type(value)


def test_the_last_override_wins(recipe_file: Path):
    assert load_recipe(recipe_file, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("override", ["stage1.steps", "=3", "stage1..steps=3", ".=1"])
def test_an_override_without_key_or_value_shows_how_to_write_one(override: str):
    with pytest.raises(ConfigError, match=r"write KEY=VALUE, for example stage1\.steps=20"):
        apply_override({}, override)


def test_an_override_cannot_run_through_a_plain_value():
    with pytest.raises(ConfigError, match="name is 'tiny', not a section"):
        apply_override({"name": "tiny"}, "name.first=1")


def test_an_override_that_is_no_yaml_is_refused():
    with pytest.raises(ConfigError, match="the value is no YAML"):
        apply_override({}, "stage1.betas=[0.9")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage1.stpes=3", "stage1.stpes: Extra inputs"),
        ("specialist=3", "specialist: Extra inputs"),
        ("specialists.text.temperature=1", "specialists.text.temperature: Extra inputs"),
        ("stage1.steps=0", r"stage1.steps: .*greater than 0 \(got 0\)"),
        ("stage1.steps=many", r"stage1.steps: .*\(got 'many'\)"),
        ("stage1.steps=1.5", "stage1.steps"),
        ("stage1.learning_rate=.inf", "stage1.learning_rate: .*finite"),
        ("stage1.betas=[0.9, 1.0]", "stage1.betas.1: .*less than 1"),
        ("stage1.composed_share=1.5", "stage1.composed_share"),
        ("stage1.schedule=linear", "stage1.schedule: .*'cosine' or 'constant'"),
        ("specialists={}", "specialists: .*at least 1"),
        ("specialists={Text: {model: a}}", "specialists.Text"),
        ("specialists={a-b: {model: a}}", "specialists.a-b"),
        ("name=../up", "name: "),
        ("data.domains.Math.sources=[{path: a}]", "data.domains.Math"),
        ("data.domains.text.sources=[]", "data.domains.text.sources: .*at least 1"),
        ("data.domains.text.sources=5", "data.domains.text.sources"),
        ("data=text.jsonl", "data: "),
        ("specialists.text.tune={domains: [maths]}", "tune.domains names maths, but data.domains has text"),
    ],
)
def test_a_mistake_is_named_by_its_key_in_one_line(recipe_file: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(recipe_file, [override])

    assert "\n" not in str(caught.value)
    assert str(recipe_file) in str(caught.value)


def test_every_mistake_is_named(recipe_file: Path):
    with pytest.raises(ConfigError, match=r"train\.sampler.*; stage1\.steps"):
        load_recipe(recipe_file, ["stage1.steps=0", "train.sampler=random"])


@pytest.mark.parametrize(
    ("text", "message"), [("a: [1", "is no YAML"), ("- a\n", "must hold a mapping"), ("", "mapping")]
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")

    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(tmp_path / "bad.yaml")

    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(tmp_path)


def test_an_environment_variable_stands_for_its_value(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TINY_ROOT", "/somewhere")

    recipe = load_recipe(recipe_file, ["data.domains.text.sources=[{path: '${TINY_ROOT}/text.jsonl'}]"])

    assert recipe.data is not None
    assert recipe.data.domains["text"].sources[0].path == "/somewhere/text.jsonl"


def test_a_variable_that_is_not_set_is_an_error_that_names_it(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TINY_ROOT", raising=False)

    with pytest.raises(ConfigError, match=r"\$\{TINY_ROOT\}/m: the environment variable TINY_ROOT is not set"):
        load_recipe(recipe_file, ["specialists.text.model=${TINY_ROOT}/m"])


def test_relative_paths_are_taken_from_the_recipes_folder_where_they_exist_there(recipe_file: Path):
    folder = recipe_file.parent
    for name in ("text.jsonl", "base", "adapter", "own.jinja", "tokens", "exams", "plain"):
        (folder / name).touch()

    recipe = load_recipe(
        recipe_file,
        [
            "specialists.text={model: base, adapter: adapter, template: own.jinja}",
            "specialists.code={model: elsewhere/base, template: plain}",
            "tokenizer=tokens",
            "data.benchmarks=exams",
        ],
    )

    assert recipe.data is not None
    text, code = recipe.specialists.values()
    assert [text.model, text.adapter, text.template, recipe.tokenizer, recipe.data.benchmarks] == [
        str(folder / name) for name in ("base", "adapter", "own.jinja", "tokens", "exams")
    ]
    assert recipe.data.domains["text"].sources[0].path == str(folder / "text.jsonl")
    assert code.model == "elsewhere/base"  # not there: from the working directory, or from the hub
    assert code.template == "plain"  # the name of a template, whatever file lies there


def test_an_absolute_path_is_left_alone(recipe_file: Path):
    assert load_recipe(recipe_file, ["specialists.text.model=/a/model"]).specialists["text"].model == "/a/model"


def test_a_run_writes_where_the_recipe_says_or_under_its_name(tmp_path: Path):
    specialists = {"text": {"model": "a/text"}}

    assert parse_recipe({"name": "a", "specialists": specialists}).folder == Path("runs/a")
    assert parse_recipe({"name": "a", "output": str(tmp_path), "specialists": specialists}).folder == tmp_path


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_recipe_in_the_repository_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch):
    text = path.read_text()
    for name in re.findall(r"\$\{(\w+)\}", text):
        monkeypatch.setenv(name, "/data")

    if "specialists:" in text:
        assert isinstance(load_recipe(path), Recipe)
    else:
        domains = load_synthesis(path).domains
        assert [load_domain(name, config).name for name, config in domains.items()] == list(domains)
