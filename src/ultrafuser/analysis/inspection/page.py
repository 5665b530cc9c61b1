"""The page of an inspection: every finding in a folder as one HTML file, with links to the files beside it.

The page is a Jinja template with autoescape, and its policy allows no script and no other source, so whatever
text a model or a user wrote stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from ultrafuser.analysis.charts import sample_heatmap
from ultrafuser.analysis.curves import curve_chart
from ultrafuser.analysis.inspection.findings import Alternative, Finding, Table, Value, read_findings
from ultrafuser.analysis.report import page_template, style_sheet, visible
from ultrafuser.analysis.scales import Scale
from ultrafuser.analysis.svg import drawing, element
from ultrafuser.drawing.palette import colour_indices, heaviest, weights_text
from ultrafuser.files import write_text_atomically

PAGE = "index.html"
LONGEST_TABLE = 60  # rows: a longer table is only linked
FOLDED_FROM = 11  # rows: such a table opens on a click
MAP_WIDTH, MAP_HEIGHT = 480, 420
LOSSES = "losses"  # the table whose lowest numbers are bold
WEIGHTS = "gate-weights"  # the table whose cells have the colour of a specialist


class Section(NamedTuple):
    """One finding with what the page needs besides."""

    finding: Finding
    tables: list[Table]  # short enough to show
    charts: list[tuple[str, Markup]]
    links: list[str]  # names of files beside the page
    colours: dict[str, int]


def write_page(folder: Path, *, name: str, notes: Sequence[str] = ()) -> Path:
    """Write `index.html` from the findings in a folder.

    Args:
        folder: With `<part>.json` files, their tables and figures.
        name: Of the run, for the heading.
        notes: What is missing, one sentence each.

    Raises:
        DataError: A finding is none of this version, or the page cannot be written.
    """
    there = frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset[str]()
    report = "../report.html" if (folder.parent / "report.html").is_file() else None
    page = render_page(read_findings(folder), name=name, notes=notes, there=there, report=report)
    write_text_atomically(page, folder / PAGE)
    return folder / PAGE


def render_page(
    findings: Sequence[Finding],
    *,
    name: str,
    notes: Sequence[str] = (),
    there: frozenset[str] = frozenset(),
    report: str | None = None,
) -> str:
    """The page as HTML.

    Args:
        findings: One section each.
        name: Of the run.
        notes: Shown on top.
        there: Names of the files beside the page, of which those of a finding are linked.
        report: Where the run's report is; None: nowhere.
    """
    page = page_template(
        files("ultrafuser.analysis.inspection").joinpath("page.html.j2").read_text(encoding="utf-8"),
        heaviest=heaviest,
        is_best=is_best,
        likeliest=likeliest,
        number=number,
        visible=visible,
        weights_text=weights_text,
    )
    return page.render(
        name=name,
        notes=notes,
        report=report,
        style=style_sheet(),
        weights=WEIGHTS,
        folded=FOLDED_FROM,
        sections=[_section(finding, there) for finding in findings],
    )


def number(value: Value) -> str:
    """A cell of a table: floats with three decimals, or four digits where they are small; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"
    return f"{value:,}" if isinstance(value, int) else value


def is_best(table: Table, column: int, value: Value) -> bool:
    """Whether a cell of the loss matrix is the lowest of its column, as far as its digits tell."""
    if table.name != LOSSES:
        return False
    return number(value) == number(min(cell for row in table.rows if isinstance(cell := row[column], float)))


def likeliest(alternatives: Sequence[Alternative]) -> str:
    """Tokens with their probabilities: `␣Paris 0.91 · ␣Lyon 0.04`; what rounds to nothing is left out."""
    shown = [one for index, one in enumerate(alternatives) if index == 0 or one.probability >= 0.005]
    return "\N{NO-BREAK SPACE}· ".join(f"{visible(one.text)}\N{NO-BREAK SPACE}{one.probability:.2f}" for one in shown)


def _section(finding: Finding, there: frozenset[str]) -> Section:
    colours = colour_indices(finding.specialists, finding.domains)
    charts: list[tuple[str, Markup]] = []
    if finding.heatmap is not None and finding.heatmap.rows:
        charts.append(("", sample_heatmap(finding.heatmap)))
    if finding.part == "curves":
        charts += [(phase, curve_chart(phase, points, colours)) for phase, points in finding.curves.items()]
    if finding.points:
        charts.append(("", _map(finding, colours)))
    wanted = [*(f"{finding.part}.{ending}" for ending in ("png", "svg")), *(f"{t.name}.csv" for t in finding.tables)]
    links = [file for file in [*wanted, f"{finding.part}.json"] if file in there]
    return Section(finding, [t for t in finding.tables if len(t.rows) <= LONGEST_TABLE], charts, links, colours)


def _map(finding: Finding, colours: dict[str, int]) -> Markup:
    xs, ys = [point.x for point in finding.points], [point.y for point in finding.points]
    # One unit is as long across as upwards: distances on the map are to be compared.
    unit = min((MAP_WIDTH - 16) / ((max(xs) - min(xs)) or 1.0), (MAP_HEIGHT - 16) / ((max(ys) - min(ys)) or 1.0))
    x = Scale(min(xs), max(xs), 8, 8 + unit * (max(xs) - min(xs)))
    y = Scale(min(ys), max(ys), 8 + unit * (max(ys) - min(ys)), 8)
    dots = [
        element(
            "g",
            element("title", point.domain),
            element("circle", cx=x(point.x), cy=y(point.y), r=3.5, class_=f"dot s{colours[point.domain]}"),
        )
        for point in finding.points
    ]
    return drawing(MAP_WIDTH, y.start + 8, f"{len(dots)} instructions on a map, by domain", *dots)
