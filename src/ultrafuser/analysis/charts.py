"""The charts of bars and cells: a score per model with its interval, and samples by specialists (Figure 6).

A chart colours by class alone: `s0`, `s1` ... are the palette, `fused` and `other` the models that are no
specialist; the page's style sheet says what they look like in light and dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from markupsafe import Markup

from ultrafuser.analysis.results import FUSED_PREFIX, SPECIALIST_PREFIX, Heatmap
from ultrafuser.analysis.scales import Number, Scale, linear_ticks
from ultrafuser.analysis.svg import drawing, element, line, text
from ultrafuser.drawing.palette import colour_indices, weights_text

WIDTH = 400
CHARACTER = 6.4  # width of a character of a label, at most
GAP = 8  # between a label and what it labels
ROW = 24
LONGEST_NAME = 20
HEATMAP_HEIGHT = 480


class Bar(NamedTuple):
    """One model's score, its interval, and the number as written."""

    model: str
    value: float
    low: float
    high: float
    label: str


def model_class(model: str, specialists: Sequence[str]) -> str:
    """The colour of a model: its own for a specialist, ink for a fused model, grey for everything else."""
    name = model.removeprefix(SPECIALIST_PREFIX)
    if model.startswith(SPECIALIST_PREFIX) and name in specialists:
        return f"s{colour_indices(specialists)[name]}"
    return "fused" if model.startswith(FUSED_PREFIX) else "other"


def bar_chart(title: str, bars: Sequence[Bar], specialists: Sequence[str], *, top: float | None = None) -> Markup:
    """Horizontal bars from zero, each with its interval.

    Args:
        title: What a screen reader says.
        bars: From top to bottom.
        specialists: Gives specialists their colours.
        top: Where the axis ends; None fits the widest interval. 1 makes it percent.
    """
    end = top or max((max(bar.value, bar.high) for bar in bars), default=1.0) or 1.0
    names = min(LONGEST_NAME, max((len(bar.model) for bar in bars), default=0)) * CHARACTER + GAP
    labels = max((len(bar.label) for bar in bars), default=0) * CHARACTER + GAP
    scale = Scale(0.0, end, names, WIDTH - labels)
    bottom = ROW * len(bars) + 4
    ticks = linear_ticks(0.0, end, 3)
    grid = [line(scale(tick), 0, scale(tick), bottom, "grid") for tick in ticks]
    numbers = [text(scale(tick), bottom + 14, _axis_number(tick, top), anchor="middle") for tick in ticks]
    rows = [_bar_row(bar, ROW * index, scale, model_class(bar.model, specialists)) for index, bar in enumerate(bars)]
    return drawing(WIDTH, bottom + 20, title, *grid, *rows, *numbers)


def _axis_number(tick: float, top: float | None) -> str:
    return f"{100 * tick:.0f}%" if top == 1.0 else f"{tick:g}"


def _bar_row(bar: Bar, y: Number, scale: Scale, class_: str) -> Markup:
    middle = y + ROW / 2 + 2
    low, high = scale(bar.low), scale(bar.high)
    ends = f"M{low:.1f} {middle - 4}v8M{high:.1f} {middle - 4}v8M{low:.1f} {middle}H{high:.1f}"
    name = bar.model if len(bar.model) <= LONGEST_NAME else bar.model[: LONGEST_NAME - 1] + "…"
    return element(
        "g",
        element("title", f"{bar.model}: {bar.label}"),
        text(scale.start - GAP, middle + 4, name, anchor="end", class_="label name"),
        element("rect", x=scale(0), y=middle - 8, width=scale(bar.value) - scale(0), height=16, class_=f"bar {class_}"),
        element("path", d=ends, class_="interval halo"),
        element("path", d=ends, class_="interval"),
        text(WIDTH, middle + 4, bar.label, anchor="end", class_="label number"),
    )


def sample_heatmap(heatmap: Heatmap) -> Markup:
    """One row per sample, grouped by domain, one column per specialist; the stronger the colour the heavier.

    Source: Ding et al. 2024 (arXiv 2403.08281), Figure 6.
    """
    order = list(dict.fromkeys(row.domain for row in heatmap.rows))
    rows = sorted(heatmap.rows, key=lambda row: order.index(row.domain))
    left, head, gap = 72, 24, 6
    height = min(14.0, max(1.5, HEATMAP_HEIGHT / max(1, len(rows))))
    width = (WIDTH - left) / len(heatmap.specialists)
    drawn = [
        text(left + (index + 0.5) * width, 15, name, anchor="middle", class_="label name")
        for index, name in enumerate(heatmap.specialists)
    ]
    colours = colour_indices(heatmap.specialists)
    y = float(head)
    for domain, members in groupby(rows, key=lambda row: row.domain):
        samples = list(members)
        drawn.append(text(left - GAP, y + len(samples) * height / 2 + 4, domain, anchor="end", class_="label name"))
        for number, row in enumerate(samples, start=1):
            cells = [
                element(
                    "rect",
                    x=left + index * width,
                    y=y,
                    width=width - 2,
                    height=height,
                    class_=f"cell s{colours[name]}",
                    style=f"--w:{weight:.3f}",
                )
                for index, (name, weight) in enumerate(zip(heatmap.specialists, row.weights, strict=True))
            ]
            words = f"{domain}, sample {number}: {weights_text(row.weights, heatmap.specialists)}"
            drawn.append(element("g", element("title", words), *cells))
            y += height
        y += gap
    title = f"Mean gate weight of {len(rows)} samples, by specialist; the table below says the same in numbers"
    return drawing(WIDTH, y, title, *drawn)
