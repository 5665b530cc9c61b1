"""Prompt files: placeholders that are missing or unknown are one clear line, and what fills them stays as it is."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrafuser.errors import ConfigError
from ultrafuser.synthesis.prompt import MAX_BYTES, Prompt, load_prompt


def write(folder: Path, text: str) -> Path:
    path = folder / "instructions.md"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_prompt_is_filled(tmp_path: Path):
    prompt = load_prompt(write(tmp_path, "Write {{count}} about {{ topic }}.\n"), needs=["count"], knows=["topic"])

    assert prompt.render(count="3", topic="soup", other="not there") == "Write 3 about soup."


def test_braces_that_are_no_placeholders_stay(tmp_path: Path):
    text = r"Answer {\"a\": {{}}} or $\frac{{1}}{2}$ or {count} with "
    path = write(tmp_path, text + "{{count}}.")

    assert load_prompt(path, needs=["count"]).render(count="3") == text + "3."


@given(st.text(), st.text())
def test_what_is_inserted_is_not_looked_at_again(first: str, second: str):
    prompt = Prompt(Path("p.md"), "{{a}}|{{b}}")

    assert prompt.render(a=first + "{{b}}", b=second + r"\1{{a}}") == first + "{{b}}|" + second + r"\1{{a}}"


def test_a_placeholder_that_is_missing_is_named(tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"instructions\.md lacks the placeholder \{\{topic\}\}: write it where"
    ) as error:
        load_prompt(write(tmp_path, "Write {{count}}."), needs=["count", "topic"])

    assert "\n" not in str(error.value)


def test_a_placeholder_that_nothing_fills_is_named_with_those_that_are(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"\{\{tpoic\}\}, which nothing fills: .* \{\{count\}\}, \{\{topic\}\}"):
        load_prompt(write(tmp_path, "{{count}} {{tpoic}}"), needs=["count"], knows=["topic"])


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"\xff\xfe", "is no UTF-8"), (b"x" * (MAX_BYTES + 1), "is larger than")],
)
def test_files_that_are_no_prompts_are_refused(tmp_path: Path, content: bytes, message: str):
    (path := tmp_path / "p.md").write_bytes(content)

    with pytest.raises(ConfigError, match=message):
        load_prompt(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no prompt file .*p\.md"):
        load_prompt(tmp_path / "p.md")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_prompt(tmp_path)
