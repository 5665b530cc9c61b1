"""Domains: those we ship are complete, and mistakes in one's own are one clear line."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ultrafuser.errors import ConfigError
from ultrafuser.synthesis.domain import SHARED, SHIPPED, load_domain, shipped_domains
from ultrafuser.synthesis.recipe import TOPIC_STAGES, DomainConfig

ROOT = Path(__file__).parent.parent
OWN = "title: birds\nabout: All about birds.\nmeta_topics: 2\nsub_topics: 4\nrecords: 10\n"


def own_domain(folder: Path, text: str = OWN, **files: str) -> DomainConfig:
    folder.mkdir(exist_ok=True)
    (folder / "domain.yaml").write_text(text, encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.md").write_text(content, encoding="utf-8")
    return DomainConfig(folder=folder)


def test_four_domains_come_with_us():
    assert shipped_domains() == ["code", "cooking", "math", "text"]


@pytest.mark.parametrize(
    ("name", "meta", "sub", "fine", "records"),
    [
        ("text", 30, 1100, 0, 100_000),
        ("code", 21, 407, 0, 100_000),
        ("math", 21, 80, 1440, 110_000),
        ("cooking", 5, 25, 0, 500),
    ],
)
def test_shipped_domains_have_the_papers_counts(name: str, meta: int, sub: int, fine: int, records: int):
    settings = load_domain(name, DomainConfig()).settings

    assert (settings.meta_topics, settings.sub_topics, settings.fine_topics, settings.records) == (
        meta,
        sub,
        fine,
        records,
    )
    assert settings.complicated == 0.3
    assert len(settings.forms) >= 8


@pytest.mark.parametrize("name", ["text", "code", "math", "cooking"])
def test_prompts_of_shipped_domains_render_whole(name: str):
    domain = load_domain(name, DomainConfig())

    for file, prompt in domain.prompts.items():
        filled = prompt.render(**domain.common, **dict.fromkeys(prompt.placeholders - domain.common.keys(), "VALUE"))
        assert "{{" not in filled, file
        assert len(filled) > 80, file


def test_topics_of_math_give_about_seventy_instructions_each():
    """1,375 of each sub-topic are too many: finer ones stand between."""
    settings = load_domain("math", DomainConfig()).settings

    assert settings.records / settings.sub_topics == 1375
    assert 60 < settings.records / settings.fine_topics < 80
    assert settings.topic_stages == TOPIC_STAGES


def test_finer_topics_can_be_gone_without():
    settings = load_domain("math", DomainConfig(settings={"fine_topics": 0})).settings

    assert settings.topic_stages == ("meta_topics", "sub_topics")


def test_ones_own_folder_needs_no_more_than_a_few_settings(tmp_path: Path):
    domain = load_domain("birds", own_domain(tmp_path, responses="Answer as an ornithologist."))

    assert domain.settings.title == "birds"
    assert domain.prompts["responses"].text == "Answer as an ornithologist."
    assert domain.prompts["instructions"].path.parent == SHARED
    assert domain.settings.gates["instructions"].near_duplicates is not None


def test_settings_are_overridden_key_by_key():
    gates = {"instructions": {"near_duplicates": {"threshold": 0.8}, "language": None}}
    settings = load_domain("cooking", DomainConfig(settings={"records": 7, "gates": gates})).settings

    assert settings.records == 7
    assert settings.sub_topics == 25
    instructions = settings.gates["instructions"]
    assert instructions.near_duplicates is not None
    assert (instructions.near_duplicates.threshold, instructions.near_duplicates.words) == (0.8, 3)
    assert instructions.language is None
    assert instructions.duplicates is not None
    assert settings.gates["strong"].language is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recrods": 5}, "recrods: Extra inputs are not permitted"),
        ({"records": 0}, "records: Input should be greater than 0 .got 0."),
        ({"shares": {"weak": 0.9}}, "make 1.6: they must make 1"),
        ({"shares": {"weak": 0.0, "free": 0.3}}, "shares.free needs free.prefix"),
        ({"sub_topics": 3}, "sub_topics 3 is less than meta_topics 5"),
        ({"fine_topics": 3}, "fine_topics 3 is less than sub_topics 25"),
        ({"responses": {"samples": 2}}, "need the gate agreement"),
        ({"gates": {"responses": {"agreement": {}}}}, "set responses.samples to 2"),
        ({"gates": {"responses": {"agreemnt": {}}}}, "agreemnt: Extra inputs"),
        ({"gates": {"answers": {}}}, "gates.answers"),
        ({"gates": {"responses": {"refusals": {"patterns": ["("]}}}}, "is no regular expression"),
        ({"angles": []}, "angles"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(settings: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message) as error:
        load_domain("cooking", DomainConfig(settings=settings))

    assert "\n" not in str(error.value)
    assert "cooking" in str(error.value)


def test_a_domain_that_is_not_there_is_told_from_those_that_are(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"domain 'astrology': none comes with us .*code, cooking, math, text"):
        load_domain("astrology", DomainConfig())
    with pytest.raises(ConfigError, match=r"holds no domain\.yaml: write one"):
        load_domain("birds", DomainConfig(folder=tmp_path))
    with pytest.raises(ConfigError, match="none comes with us"):
        load_domain("shared", DomainConfig())  # what the others share is no domain


@pytest.mark.parametrize(("text", "message"), [("- a\n", "must hold a mapping"), ("a: [", "is no YAML")])
def test_a_settings_file_that_is_none_is_refused(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError, match=message) as error:
        load_domain("birds", own_domain(tmp_path, text))

    assert "\n" not in str(error.value)


def test_a_prompt_without_its_placeholder_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"strong\.md lacks the placeholder \{\{avoid\}\}, \{\{examples\}\}"):
        load_domain("birds", own_domain(tmp_path, strong="Write {{count}}. {{format}}"))


def test_a_prompt_file_of_a_misspelt_name_is_not_passed_over(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"responces\.md is no prompt of any stage: name it as one of .*responses"):
        load_domain("birds", own_domain(tmp_path, responces="Answer well."))
    load_domain("birds", own_domain(tmp_path / "other", README="Notes."))


@pytest.mark.slow
def test_an_installed_package_has_every_domain_and_the_source_of_its_kernels(tmp_path: Path):
    """The wheel is built, unpacked elsewhere, and its domains load from there."""
    pytest.importorskip("hatchling")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    shipped = {str(path.relative_to(SHIPPED)) for path in SHIPPED.rglob("*") if path.is_file()}
    kernels = tmp_path / "installed" / "ultrafuser" / "kernels"
    sources = {path.name for path in (ROOT / "src" / "ultrafuser" / "kernels").glob("*.[ch]")}
    assert "native.c" in sources
    assert sources <= {path.name for path in kernels.iterdir()}
    there = tmp_path / "installed" / "ultrafuser" / "synthesis" / "domains"
    script = (
        "import ultrafuser.synthesis.domain as d; from ultrafuser.synthesis.recipe import DomainConfig; "
        "print(d.__file__, *[d.load_domain(n, DomainConfig()).name for n in d.shipped_domains()])"
    )

    result = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": str(tmp_path / "installed")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )

    assert {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()} == shipped
    file, *names = result.stdout.split()
    assert file.startswith(str(tmp_path))
    assert names == ["code", "cooking", "math", "text"]
