"""The report is one page that stands alone, shows what there is, and runs nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from test_results import make_results, score
from ultrafuser.analysis.curves import MOST_POINTS, domain_points
from ultrafuser.analysis.report import render_report, write_report
from ultrafuser.analysis.results import Answer, AnswerToken, CurvePoint, Heatmap, HeatmapRow, Results
from ultrafuser.analysis.scales import Scale, linear_ticks, log_ticks

VOID = {"meta", "link", "br", "img", "input", "hr"}
EVIL = "<script>alert(1)</script>\"'&</style>"


class Page(HTMLParser):
    """Collects what tests ask for, and checks that every element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    @property
    def sections(self) -> list[str | None]:
        return [attributes.get("id") for tag, attributes in self.elements if tag == "section"]

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.elements if name in (attributes.get("class") or "").split()]


def full_results() -> Results:
    return make_results(gate_weights={"fused:stage2": {"text": {"text": 0.8, "code": 0.2}}}, notes=["A note."])


def test_a_full_report_has_every_section() -> None:
    """In the order of the argument: scores, where they come from inside, how it was trained, provenance."""
    page = Page(render_report(full_results()))

    assert page.sections == [
        *("scores", "accuracy", "loss", "gate-weights", "heatmap", "answers", "curves", "provenance")
    ]
    assert "fused:stage2 has a loss below the best specialist's in 1 of 2 domains; not in code." in page.words
    assert "0.400 [0.400, 0.400]" in page.words
    assert "learning_rate: 0.001" in page.words
    assert "A note." in page.words


def test_sections_with_nothing_to_show_are_left_out() -> None:
    """A study without answers, heatmap, curves or checkable accuracy still has its page."""
    bare = make_results(
        scores={"base": {"text": score(1.0)}}, heatmap=None, answers=[], curves={}, timings={}, recipe={}, hardware={}
    )

    page = Page(render_report(bare))

    assert page.sections == ["scores", "loss", "provenance"]
    assert "accuracy" not in page.words.lower()
    assert Page(render_report(make_results(scores={}, heatmap=None, answers=[], curves={}))).sections == ["provenance"]


def test_whatever_a_model_wrote_stays_text() -> None:
    """Names, questions, tokens, notes and the recipe may all hold markup."""
    answer = Answer(
        domain=EVIL,
        question=EVIL,
        expected=EVIL,
        correct=False,
        model=EVIL,
        tokens=[AnswerToken(text=EVIL, weights=[0.5, 0.5])],
    )
    names = [EVIL, "code"]
    results = make_results(
        name=EVIL,
        recipe={EVIL: EVIL},
        versions={EVIL: EVIL},
        hardware={EVIL: EVIL},
        scores={EVIL: {EVIL: score(1.0, 0.5)}, f"specialist:{EVIL}": {EVIL: score(2.0, 0.5)}},
        gate_weights={EVIL: {EVIL: {EVIL: 0.5, "code": 0.5}}},
        heatmap=Heatmap(specialists=names, rows=[HeatmapRow(domain=EVIL, weights=[0.5, 0.5])]),
        answers=[answer],
        curves={EVIL: [CurvePoint(step=1, loss={EVIL: 1.0}), CurvePoint(step=2, loss={EVIL: 0.5})]},
        timings={EVIL: 1.0},
        notes=[EVIL],
    )

    html = render_report(results)
    page = Page(html)

    assert not [tag for tag, _ in page.elements if tag == "script"]
    assert html.count("</style>") == 1
    assert "<script>alert(1)</script>" in page.words


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    """No element and no style fetches anything, and the page forbids it to itself."""
    write_report(full_results(), tmp_path / "report.html")

    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)

    fetching = {"src", "href", "srcset", "data", "action", "poster", "xlink:href"}
    assert not [attributes for _, attributes in page.elements if fetching & attributes.keys()]
    assert "url(" not in html
    assert "@import" not in html
    assert set(re.findall(r"https?://[^\s\"<]*", html)) <= {"http://www.w3.org/2000/svg"}
    policies = [attributes["content"] for _, attributes in page.elements if "http-equiv" in attributes]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_a_token_shows_its_heaviest_specialist_and_all_weights() -> None:
    """The class is the colour, `--w` the strength, the title the rest."""
    (token,) = Page(render_report(full_results())).of_class("token")

    assert token == {"class": "token s0", "style": "--w:0.750", "title": "text 0.75 · code 0.25"}


def test_one_specialist_has_one_colour_everywhere() -> None:
    """Bars, table of weights, heatmap and tokens of `text` are all `s0`."""
    page = Page(render_report(full_results()))

    for name in ("bar", "weight", "cell", "token", "swatch"):
        assert "s0" in {part for found in page.of_class(name) for part in (found["class"] or "").split()}, name


def test_the_best_of_each_column_is_bold() -> None:
    """Two best losses, and three best accuracies because two tie on text."""
    assert len(Page(render_report(full_results())).of_class("best")) == 5


def test_every_drawing_has_a_title_and_a_table_beside_it() -> None:
    """A screen reader gets the name of each drawing, and its numbers as a table."""
    page = Page(render_report(full_results()))

    drawings = [attributes for tag, attributes in page.elements if tag == "svg" and "aria-hidden" not in attributes]
    assert drawings
    assert all(attributes.get("role") == "img" and attributes.get("aria-label") for attributes in drawings)
    assert page.words.count("The same in numbers") == 2


def test_a_sample_has_one_row_of_cells_and_domains_stay_together() -> None:
    """Rows that come mixed are grouped by domain, in the order of first mention."""
    rows = [HeatmapRow(domain=name, weights=[1.0, 0.0]) for name in ("text", "code", "text")]
    page = Page(render_report(make_results(heatmap=Heatmap(specialists=["text", "code"], rows=rows))))

    assert len(page.of_class("cell")) == 6
    assert page.words.index("text, sample 2") < page.words.index("code, sample 1")


def test_long_curves_are_averaged_not_cut() -> None:
    """Few points remain, and they keep the mean and every domain's own steps."""
    points = [CurvePoint(step=step, loss={"text": float(step)}) for step in range(1000)]
    points += [CurvePoint(step=1000, loss={"code": 1.0})]

    curve = domain_points(points, "text")

    assert len(curve) <= MOST_POINTS
    assert curve[0] == (4.0, 4.0)
    assert domain_points(points, "code") == [(1000.0, 1.0)]


@pytest.mark.parametrize(
    ("low", "high", "ticks"), [(0, 1, [0, 0.5, 1]), (0, 5.6, [0, 2, 4]), (1, 150, [50, 100, 150]), (3, 3, [3])]
)
def test_linear_axes_show_round_numbers(low: float, high: float, ticks: list[float]) -> None:
    """Multiples of 1, 2 or 5, within the axis."""
    assert linear_ticks(low, high, 3) == ticks


def test_log_axes_show_round_numbers_and_space_by_ratio() -> None:
    """The geometric mean is halfway."""
    assert log_ticks(0.15, 3) == [0.2, 0.5, 1, 2]
    assert log_ticks(0.001, 100) == [0.001, 0.01, 0.1, 1, 10, 100]
    assert Scale(0.1, 10, 0, 100, log=True)(1.0) == pytest.approx(50)
