"""`prepare` shows what training will see: counts at every step, and records token by token."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tiny_specialists import make_tokenizer
from ultrafuser.alignment.collate import collate
from ultrafuser.alignment.encode import EncodedRecord, EncodedTurn, Encoder
from ultrafuser.analysis.prepared import prepare
from ultrafuser.analysis.prepared_text import print_preparation
from ultrafuser.analysis.token_view import SeenToken, check_alignment, render_view, view_record
from ultrafuser.chat import Message, load_template
from ultrafuser.cli.main import app
from ultrafuser.config.load import parse_recipe
from ultrafuser.config.recipe import Recipe
from ultrafuser.errors import ConfigError, DataError, UltrafuserError

SHORT = {"prompt": "hi", "completion": "yo"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A specialist's folder without weights: preparing needs none."""
    path = tmp_path_factory.mktemp("specialist")
    make_tokenizer().save_pretrained(path)
    return path


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def make_recipe(folder: Path, path: Path, **data: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "test",
            "specialists": {
                "text": {"model": str(folder), "template": "plain"},
                "code": {"model": str(folder), "template": "chatml"},
            },
            "data": {"domains": {"text": {"sources": [{"path": str(path)}]}}, "validation_fraction": 0.0} | data,
        }
    )


def printed(recipe: Recipe, *, show: int, colour: bool = False) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=120, force_terminal=colour, color_system="truecolor" if colour else None)
    print_preparation(recipe, show=show, console=console)
    return stream.getvalue()


def test_records_are_counted_at_every_step(folder: Path, tmp_path: Path) -> None:
    """What was read is what is kept and what was left out, each with its reason."""
    long = {"prompt": "hi", "completion": "y" * 200}
    other = {"prompt": "ho", "completion": "yo"}
    path = write(tmp_path / "r.jsonl", SHORT, SHORT, other, {"prompt": "hi", "completion": " "}, long)

    count = prepare(make_recipe(folder, path, max_length=100, bad_records="skip")).domains["text"]

    assert count.report.read == 4
    assert count.report.duplicates == 1
    assert dict(count.report.problems.counts) == {"no response": 1}
    assert (count.left_out, count.cut) == (1, 0)
    assert count.kept == {"train": 2, "validation": 0, "test": 0}
    assert count.response_tokens == [3, 3]


def test_the_first_bad_record_is_named_by_file_and_line(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", SHORT, {"prompt": "hi", "completion": ""})

    shown = printed(make_recipe(folder, path, bad_records="skip"), show=0)

    assert "1 bad records were skipped (1 no response)" in shown
    assert f"no response: {path}:2: " in shown


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": ', "not JSON"),
        ('{"prompt": "hi", "completion": ""}', "is empty"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "no assistant message"),
        ('{"what": 1}', "format"),
    ],
)
def test_a_bad_record_stops_with_file_and_line(folder: Path, tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(SHORT) + "\n" + line + "\n", encoding="utf-8")

    with pytest.raises(DataError, match=r"r\.jsonl:2: ") as caught:
        prepare(make_recipe(folder, path))

    assert words in str(caught.value)


def test_a_record_that_a_template_refuses_is_named_by_file_and_line(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", SHORT)
    template = tmp_path / "picky.jinja"
    template.write_text(
        "{% if messages[0].content == 'hi' %}{{ raise_exception('no hi') }}{% endif %}", encoding="utf-8"
    )
    tree = make_recipe(folder, path).model_dump()
    tree["specialists"]["code"]["template"] = str(template)

    with pytest.raises(DataError, match=r"r\.jsonl:1: template .* cannot write this conversation: no hi"):
        prepare(parse_recipe(tree))


def test_a_record_over_the_limit_is_an_error_where_the_recipe_says_so(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", SHORT, {"prompt": "hi", "completion": "y" * 200})

    with pytest.raises(DataError, match=r"r\.jsonl:2: \d+ tokens, \d+ over max_length 100"):
        prepare(make_recipe(folder, path, max_length=100, overlength="error"))


def test_cut_records_that_lost_their_stop_token_are_counted(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", SHORT, {"prompt": "hi", "completion": "y" * 200})
    recipe = make_recipe(folder, path, max_length=100, overlength="truncate")

    count = prepare(recipe).domains["text"]

    assert (count.left_out, count.cut, count.stop_untrained) == (0, 1, 1)
    assert count.kept["train"] == 2
    assert "1 of them lost the stop token" in printed(recipe, show=0)


def test_a_domain_without_records_is_an_error(folder: Path, tmp_path: Path) -> None:
    """Whether the file is empty or everything in it is too long."""
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    long = write(tmp_path / "long.jsonl", {"prompt": "hi", "completion": "y" * 200})

    with pytest.raises(DataError, match="is empty"):
        prepare(make_recipe(folder, empty))
    with pytest.raises(DataError, match="'text' has no training records left"):
        prepare(make_recipe(folder, long, max_length=100))


def test_a_recipe_without_data_is_an_error(folder: Path) -> None:
    recipe = parse_recipe({"name": "x", "specialists": {"text": {"model": str(folder)}}})

    with pytest.raises(ConfigError, match="no data section"):
        prepare(recipe)


def test_each_specialist_sees_its_own_prompt_and_the_shared_response() -> None:
    """Where a template ends turns otherwise, the shared end token is trained but hidden from its history."""
    encoder = Encoder(make_tokenizer(), [load_template("plain"), load_template("chatml")])
    conversation = (
        Message("user", "hi"),
        Message("assistant", "é!"),
        Message("user", "so"),
        Message("assistant", "ok"),
    )
    record = encoder.encode(conversation, id="x", domain="text")

    plain, chatml = view_record(record, encoder)

    assert render_view(plain, colour=False).plain == "<s>hi[[|é|!|</s>]]so[[o|k|</s>]]"
    assert render_view(chatml, colour=False).plain == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[[|é|!]]{{</s>}}<|im_end|>\n"
        "<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n[[o|k]]{{</s>}}"
    )
    trained = [[token.token_id for token in view if token.role != "prompt"] for view in (plain, chatml)]
    assert trained[0] == trained[1] == [id for turn in record.turns for id in turn.response]


def test_with_colour_the_text_is_unmarked() -> None:
    """Trained tokens have one of two backgrounds in turn, so that their borders show."""
    tokens = [SeenToken("hi", 1, "prompt"), SeenToken("y", 2, "trained"), SeenToken("o", 3, "trained")]

    text = render_view(tokens, colour=True)

    assert text.plain == "hiyo"
    assert len({str(span.style) for span in text.spans}) == 3


def test_a_record_cannot_write_escape_sequences() -> None:
    assert "\x1b" not in render_view([SeenToken("\x1b[2J", 1, "trained")], colour=False).plain


def test_a_view_of_broken_tensors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check reads what training reads, so it would see a bug in between."""
    encoder = Encoder(make_tokenizer(), [load_template("plain")] * 2)
    record = EncodedRecord("x", "text", (EncodedTurn(((5,), (6, 7)), (8, 2), (False, False)),))
    check_alignment(record, encoder)

    def shift(*arguments: Any, **options: Any) -> Any:
        batch = collate(*arguments, **options)
        batch.specialist_input_ids[0, 1] += 1
        return batch

    monkeypatch.setattr("ultrafuser.analysis.token_view.collate", shift)
    with pytest.raises(AssertionError, match="specialist 1 has other responses"):
        check_alignment(record, encoder)


def test_shown_records_name_their_place_and_every_specialist(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", SHORT, {"prompt": "ho", "completion": "yo"})

    shown = printed(make_recipe(folder, path), show=1)
    coloured = printed(make_recipe(folder, path), show=1, colour=True)

    assert f"text: {path}:1 (" in shown
    assert f"{path}:2 (" not in shown
    assert "[[y|o|</s>]]" in shown
    assert "[[y|o]]{{</s>}}" in shown
    assert "[[" not in coloured
    assert "\x1b[" in coloured


def test_the_command_prepares_and_shows(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "r.jsonl", SHORT)
    recipe = tmp_path / "recipe.yaml"
    tree = make_recipe(folder, Path("r.jsonl")).model_dump(mode="json")
    recipe.write_text(json.dumps(tree), encoding="utf-8")

    result = CliRunner().invoke(app, ["prepare", str(recipe), "--show", "1"])
    refused = CliRunner().invoke(app, ["prepare", str(recipe), "--set", "data.max_length=1"])

    assert result.exit_code == 0
    assert "[[y|o|</s>]]" in result.stdout
    assert isinstance(refused.exception, UltrafuserError)
