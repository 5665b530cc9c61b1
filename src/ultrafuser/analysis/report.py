"""The report: `results.json` as one HTML page that needs no other file.

The page is a Jinja template with autoescape, so whatever text a model or a user wrote stays text.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import yaml
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from ultrafuser.analysis.charts import Bar, bar_chart, model_class, sample_heatmap
from ultrafuser.analysis.curves import curve_chart, domain_points
from ultrafuser.analysis.results import Heatmap, Results, Score
from ultrafuser.analysis.summary import (
    Best,
    accuracy_interval,
    best_models,
    duration,
    headline,
    loss_interval,
    percent,
)
from ultrafuser.drawing.palette import PALETTE, STRENGTH, colour_indices, heaviest, weights_text
from ultrafuser.files import write_text_atomically

Charts = list[tuple[str, Markup]]  # a caption and a chart
INSPECTION = "inspection/index.html"  # beside a report, where `ultrafuser inspect` writes it


class Column(NamedTuple):
    """One domain of the table of scores."""

    domain: str
    best: Best
    has_accuracy: bool
    size: str


class HeatmapSummary(NamedTuple):
    """The samples of one domain, in numbers."""

    domain: str
    num_samples: int
    cells: list[str]


class CurveSummary(NamedTuple):
    """One line of a loss chart, in numbers."""

    phase: str
    domain: str
    num_steps: int
    first: float
    last: float


def write_report(results: Results, path: Path) -> None:
    """Write the report; sections with nothing to show are left out, and an inspection beside it is linked.

    Raises:
        DataError: The file cannot be written.
    """
    inspection = INSPECTION if (path.parent / INSPECTION).is_file() else None
    write_text_atomically(render_report(results, inspection=inspection), path)


def render_report(results: Results, *, inspection: str | None = None) -> str:
    """The report as HTML; `inspection` is where the page of an inspection is."""
    page = page_template(
        _resource("report.html.j2"),
        accuracy_interval=accuracy_interval,
        duration=duration,
        heaviest=heaviest,
        loss_interval=loss_interval,
        model_class=model_class,
        percent=percent,
        visible=visible,
        weights_text=weights_text,
    )
    curves = {phase: points for phase, points in results.curves.items() if any(point.loss for point in points)}
    curve_domains = list(dict.fromkeys(name for points in curves.values() for point in points for name in point.loss))
    colours = colour_indices(results.specialists, [*results.domains, *curve_domains])
    return page.render(
        results=results,
        inspection=inspection,
        style=style_sheet(),
        colours=colours,
        headline=headline(results),
        columns=[_column(results, domain) for domain in results.domains],
        accuracy_bars=_accuracy_bars(results),
        loss_bars=_loss_bars(results),
        heatmap=sample_heatmap(results.heatmap) if results.heatmap and results.heatmap.rows else None,
        heatmap_table=_heatmap_table(results.heatmap) if results.heatmap else [],
        curve_domains=curve_domains,
        curve_charts=[(phase, curve_chart(phase, points, colours)) for phase, points in curves.items()],
        curve_table=_curve_table(results, curve_domains),
        timings=[(name, duration(seconds)) for name, seconds in results.timings.items()],
        recipe=_recipe(results),
    )


def page_template(source: str, **functions: Callable[..., object]) -> Template:
    """A template that escapes whatever is put into it, and refuses what it does not know; `functions` it may call."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(functions)
    return environment.from_string(source)


def visible(text: str) -> str:
    """A token for a table cell: spaces, tabs and line ends as signs."""
    return text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")


def _resource(name: str) -> str:
    return files("ultrafuser.analysis").joinpath(name).read_text(encoding="utf-8")


def _recipe(results: Results) -> str:
    """As YAML; by way of JSON, because a recipe made in Python may hold paths and tuples."""
    recipe = results.model_dump(mode="json")["recipe"]
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else ""


def style_sheet() -> Markup:
    """Our own style sheet plus the palette: nothing in it comes from the results."""
    palette = "".join(f".s{index} {{ --c: {' '.join(map(str, colour))}; }}\n" for index, colour in enumerate(PALETTE))
    return Markup(f"{_resource('report.css')}:root {{ --strength: {STRENGTH}; }}\n{palette}")


def _domain_scores(results: Results, domain: str) -> dict[str, Score]:
    return {model: scores[domain] for model, scores in results.scores.items() if domain in scores}


def _column(results: Results, domain: str) -> Column:
    scores = _domain_scores(results, domain).values()
    sizes = dict.fromkeys(f"{score.n:,} / {score.tokens:,}" for score in scores)
    has_accuracy = any(score.accuracy is not None for score in scores)
    return Column(
        domain, best_models(results, domain), has_accuracy, next(iter(sizes)) if len(sizes) == 1 else "varies"
    )


def _accuracy_bars(results: Results) -> Charts:
    charts: Charts = []
    for domain in results.domains:
        bars = [
            Bar(model, score.accuracy, score.accuracy_low, score.accuracy_high, _label(percent(score.accuracy), score))
            for model, score in _domain_scores(results, domain).items()
            if score.accuracy is not None and score.accuracy_low is not None and score.accuracy_high is not None
        ]
        if bars:
            charts.append((domain, bar_chart(f"Accuracy on {domain}", bars, results.specialists, top=1.0)))
    return charts


def _label(value: str, score: Score) -> str:
    return f"{value} {accuracy_interval(score)}"


def _loss_bars(results: Results) -> Charts:
    charts: Charts = []
    for domain in results.domains:
        bars = [
            Bar(model, score.loss, score.loss_low, score.loss_high, f"{score.loss:.3f} {loss_interval(score)}")
            for model, score in _domain_scores(results, domain).items()
        ]
        charts.append((domain, bar_chart(f"Loss on {domain}, nats per token", bars, results.specialists)))
    return charts


def _heatmap_table(heatmap: Heatmap) -> list[HeatmapSummary]:
    rows: list[HeatmapSummary] = []
    for domain in dict.fromkeys(row.domain for row in heatmap.rows):
        columns = list(zip(*(row.weights for row in heatmap.rows if row.domain == domain), strict=True))
        cells = [f"{fmean(column):.2f} ({min(column):.2f}–{max(column):.2f})" for column in columns]
        rows.append(HeatmapSummary(domain, sum(row.domain == domain for row in heatmap.rows), cells))
    return rows


def _curve_table(results: Results, domains: list[str]) -> list[CurveSummary]:
    rows: list[CurveSummary] = []
    for phase, points in results.curves.items():
        for domain in domains:
            if curve := domain_points(points, domain):
                num_steps = sum(domain in point.loss for point in points)
                rows.append(CurveSummary(phase, domain, num_steps, curve[0][1], curve[-1][1]))
    return rows
