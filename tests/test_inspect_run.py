"""`ultrafuser inspect` on a run folder: files, page, figures, links, and one line for whatever is missing."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from inspect_helpers import NAMES, make_run, write_checkpoint, write_recipe, write_records
from test_results import make_results
from ultrafuser.analysis.inspection.findings import (
    Alternative,
    Finding,
    Table,
    TokenView,
    ViewedToken,
    read_findings,
    to_csv,
    write_finding,
)
from ultrafuser.analysis.inspection.inspect import Options, inspect, parse_parts
from ultrafuser.analysis.inspection.page import likeliest, number, render_page
from ultrafuser.analysis.inspection.plots import INSTALL, write_plots
from ultrafuser.analysis.inspection.records import locate, sample_records
from ultrafuser.analysis.inspection.show import print_finding
from ultrafuser.analysis.report import write_report
from ultrafuser.analysis.results import write_results
from ultrafuser.cli.main import app
from ultrafuser.errors import ConfigError, DataError
from ultrafuser.model.generator import FusedGenerator

QUICK = Options(max_tokens=4, answers=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy to change; its recipe names the data of the original."""
    return Path(shutil.copytree(made, tmp_path / "run"))


class Page(HTMLParser):
    """Links, ids and element names of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def links(self) -> list[str]:
        return [str(attributes["href"]) for tag, attributes in self.tags if tag == "a"]


def test_a_run_is_inspected_whole(run: Path) -> None:
    """Every part is found, every file is linked and there, and the report links the page."""
    write_results(make_results(), run / "results.json")
    write_report(make_results(), run / "report.html")
    assert "inspection/index.html" not in (run / "report.html").read_text(encoding="utf-8")

    inspection = inspect(run, QUICK)

    parts = ["losses", "gate", "heatmap", "tokens", "curves", "stability", "embeddings"]
    assert [finding.part for finding in inspection.findings] == parts
    assert inspection.missing == []
    links = Page(inspection.page.read_text(encoding="utf-8")).links()
    written = {path.name for path in (run / "inspection").iterdir()} - {"index.html"}
    assert written == {link for link in links if not link.startswith(("#", "../"))}
    drawn = {f"{part}.{ending}" for part in parts if part != "tokens" for ending in ("png", "svg")}
    assert drawn <= written
    assert "../report.html" in links
    assert "inspection/index.html" in Page((run / "report.html").read_text(encoding="utf-8")).links()


def test_the_numbers_are_those_of_the_held_out_records(run: Path) -> None:
    """In JSON and in CSV; the fused loss is that of scoring the same records."""
    inspect(run, Options(parts=("losses",)))

    sample = sample_records(locate(run), data=None, limit=100)
    generator = FusedGenerator.from_pretrained(str(run / "model"))
    rows = list(csv.DictReader((run / "inspection" / "losses.csv").open(encoding="utf-8")))
    saved = json.loads((run / "inspection" / "losses.json").read_text(encoding="utf-8"))
    for column, (domain, records) in enumerate(sample.records.items(), start=1):
        scores = generator.score([record.messages for record in records])
        expected = -sum(sum(s.log_probs) for s in scores) / sum(s.num_tokens for s in scores)
        assert float(rows[-1][domain]) == pytest.approx(expected, rel=1e-4)
        assert saved["tables"][0]["rows"][-1][column] == pytest.approx(expected, rel=1e-4)
    assert list(sample.records) == list(NAMES)
    assert "validation" in saved["notes"][0]


def test_what_is_missing_takes_one_line_each_and_the_rest_is_done(run: Path) -> None:
    shutil.rmtree(run / "model")

    inspection = inspect(run, QUICK)

    assert [finding.part for finding in inspection.findings] == ["curves", "stability"]
    assert [line.split(":")[0] for line in inspection.missing] == ["losses", "gate", "heatmap", "tokens", "embeddings"]
    assert all("no model at" in line and "\n" not in line for line in inspection.missing)
    assert "no model at" in inspection.page.read_text(encoding="utf-8")


def test_a_model_that_cannot_be_loaded_is_one_line(run: Path) -> None:
    (run / "model" / "model.safetensors").write_bytes(b"nothing")

    inspection = inspect(run, Options(parts=("gate", "curves")))

    assert "cannot be loaded" in inspection.missing[0]
    assert "\n" not in inspection.missing[0]
    assert [finding.part for finding in inspection.findings] == ["curves"]


def test_a_model_folder_needs_a_file_of_records(run: Path, tmp_path: Path) -> None:
    """Its records' field `domain` names their domains."""
    (run / "model" / "recipe.yaml").unlink(missing_ok=True)
    write_records(tmp_path / "mine.jsonl", "Where", 3, domain="geo")
    parts = parse_parts("losses,curves", question=False)

    without = inspect(run / "model", Options(parts=parts))
    with_data = inspect(run / "model", Options(parts=parts, data=tmp_path / "mine.jsonl", limit=2))

    assert "--data" in without.missing[0]
    assert "name the folder of the run" in without.missing[1]
    assert with_data.findings[0].tables[1].rows == [["geo", 2, with_data.findings[0].tables[1].rows[0][2]]]
    assert with_data.page == run / "model" / "inspection" / "index.html"


def test_a_file_without_domains_is_one_domain_of_its_name(run: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "mine.jsonl", "Where", 3)

    sample = sample_records(locate(run), data=tmp_path / "mine.jsonl", limit=100)

    assert {domain: len(records) for domain, records in sample.records.items()} == {"mine": 3}


def test_test_records_go_before_validation_records(run: Path) -> None:
    """And a recipe that holds none back says what to do."""
    for name in NAMES:
        write_records(run / "data" / f"{name}.jsonl", f"{name} q", 40)
    write_recipe(run, validation_fraction=0.3, test_fraction=0.3)
    assert sample_records(locate(run), data=None, limit=5).source == "the run's test records"

    write_recipe(run, validation_fraction=0.0)
    with pytest.raises(DataError, match="--data"):
        sample_records(locate(run), data=None, limit=5)


def test_kept_checkpoints_are_compared(run: Path) -> None:
    """Two of the last stage: the model's own gate, and one that weighs everybody the same."""
    generator = FusedGenerator.from_pretrained(str(run / "model"))
    gate = {n: p.detach() for n, p in generator.model.named_parameters() if n.startswith("fusion_gate")}
    write_checkpoint(run, "stage2", 1, {name: torch.zeros_like(value) for name, value in gate.items()})
    write_checkpoint(run, "stage2", 2, gate)

    found = inspect(run, Options(parts=("losses", "stability")))

    losses, stability = found.findings
    each = stability.tables[1]
    assert [row[0] for row in each.rows] == ["step-00000001", "step-00000002"]
    assert each.rows[1][1:] == [pytest.approx(value, rel=1e-4) for value in losses.tables[0].rows[-1][1:]]
    assert each.rows[0][1] != pytest.approx(each.rows[1][1], rel=1e-3)


def test_one_part_inspected_anew_keeps_the_others(run: Path) -> None:
    inspect(run, Options(parts=("curves",)))
    inspect(run, Options(parts=("question",), question="Who?", max_tokens=3))

    assert [finding.part for finding in read_findings(run / "inspection")] == ["question", "curves"]
    page = (run / "inspection" / "index.html").read_text(encoding="utf-8")
    assert 'id="question"' in page
    assert 'id="curves"' in page


def test_without_matplotlib_the_numbers_are_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    inspection = inspect(run, Options(parts=("curves", "gate")))

    assert inspection.missing == [INSTALL]
    assert {path.suffix for path in (run / "inspection").iterdir()} == {".json", ".csv", ".html"}


def test_figures_are_the_same_each_time(run: Path, tmp_path: Path) -> None:
    """Byte for byte, as long as the numbers are."""
    findings = inspect(run, QUICK).findings

    for finding in findings:
        first, second = write_plots(finding, tmp_path / "a"), write_plots(finding, tmp_path / "b")
        assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert len(list((tmp_path / "a").iterdir())) == 12


def test_a_dollar_in_a_name_is_no_mathematics(tmp_path: Path) -> None:
    table = Table(name="losses", caption="c", columns=["model", "$x_"], rows=[["$m$", 1.0], ["$n_$", 2.0]])
    finding = Finding(part="losses", title="t", words="w", domains=["$x_"], tables=[table])

    assert [path.name for path in write_plots(finding, tmp_path)] == ["losses.png", "losses.svg"]


EVIL = "<script>alert(1)</script>\x1b[31m[bold]\"'&"


def evil_finding() -> Finding:
    alternative = Alternative(text=EVIL, probability=0.5)
    token = ViewedToken(text=EVIL, weights=[1.0], probability=0.5, fused=[alternative], alternatives=[[alternative]])
    view = TokenView(domain=EVIL, question=EVIL, expected=EVIL, tokens=[token], alone={EVIL: EVIL})
    table = Table(name="evil", caption=EVIL, columns=[EVIL, "n"], rows=[[EVIL, 1]])
    return Finding(
        part="question", title=EVIL, words=EVIL, specialists=[EVIL], tables=[table], notes=[EVIL], views=[view]
    )


def test_nothing_written_by_a_model_or_user_becomes_markup() -> None:
    """And the page's policy allows neither scripts nor other sources."""
    html = render_page([evil_finding()], name=EVIL, notes=[EVIL], there=frozenset({"question.json"}))

    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert html.count("&lt;script&gt;") >= 12
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    sources = {name for _, attributes in page.tags for name in attributes} & {"src", "srcset", "data"}
    assert sources == set()


def test_nothing_written_by_a_model_or_user_controls_the_terminal() -> None:
    stream = io.StringIO()

    print_finding(evil_finding(), Console(file=stream, width=300, color_system=None))

    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().count("[bold]") >= 8


def test_numbers_are_written_short() -> None:
    assert [number(value) for value in (0.12345, 0.00012345, 0.0, 1234, "a", None)] == [
        "0.123",
        "0.00012",
        "0.000",
        "1,234",
        "a",
        "–",
    ]


def test_alternatives_leave_out_what_rounds_to_nothing() -> None:
    alternatives = [Alternative(text=" a", probability=0.9), Alternative(text="b", probability=0.001)]

    assert likeliest(alternatives).replace("\xa0", " ") == "␣a 0.90"
    assert likeliest(alternatives[1:]).replace("\xa0", " ") == "b 0.00"


def test_a_table_becomes_csv() -> None:
    table = Table(name="a", caption="c", columns=["x", "y, z"], rows=[["a,b", 1.5], ["c", None]])

    assert to_csv(table) == 'x,"y, z"\n"a,b",1.5\nc,\n'


def test_a_finding_of_another_version_is_named(tmp_path: Path) -> None:
    finding = Finding(part="gate", title="t", words="w")
    write_finding(finding, tmp_path)
    assert read_findings(tmp_path) == [finding]
    (tmp_path / "gate.json").write_text('{"part": "gate", "colour": 1}', encoding="utf-8")

    with pytest.raises(DataError, match=r"gate\.json is no finding of this version, so delete it: title"):
        read_findings(tmp_path)


def test_parts_are_chosen_by_name() -> None:
    """In the order of the page; a question alone leaves out the rest."""
    assert parse_parts("gate, losses", question=False) == ("losses", "gate")
    assert parse_parts(None, question=True) == ("question",)
    assert "question" not in parse_parts(None, question=False)
    assert parse_parts("gate", question=True) == ("gate", "question")
    with pytest.raises(ConfigError, match="needs a question"):
        parse_parts("question", question=False)
    with pytest.raises(ConfigError, match="'gates' is no part: choose from losses, gate"):
        parse_parts("gates", question=False)


def invoke(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_the_command_prints_tables_and_the_page(run: Path) -> None:
    code, output = invoke(run, "--only", "losses,gate", "--output", run / "elsewhere")

    assert code == 0
    assert re.search(r"specialist:code\W+\d\.\d{3}", output)
    assert "switching rate" in output
    assert "95% intervals" in output
    assert output.strip().endswith(str(run / "elsewhere" / "index.html"))
    assert not (run / "inspection").exists()


def test_the_command_answers_a_question(run: Path) -> None:
    code, output = invoke(run, "--question", "Who?", "--max-tokens", 3)

    assert code == 0
    assert "math alone" in output
    assert "fused would write" in output
    assert "Losses" not in output


def test_an_encoder_is_a_specialist_or_a_folder(run: Path) -> None:
    inspection = inspect(run, Options(parts=("embeddings",), encoder="nobody"))
    other = inspect(run, Options(parts=("embeddings",), encoder="math"))

    assert "no folder and no specialist; there are text, code, math" in inspection.missing[0]
    assert "the specialist math" in other.findings[0].words


def test_no_folder_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="name the folder of a run"):
        inspect(tmp_path / "nothing")
