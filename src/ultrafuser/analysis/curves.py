"""Loss curves: one chart per phase, one line per domain (as Figure 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from markupsafe import Markup

from ultrafuser.analysis.results import CurvePoint
from ultrafuser.analysis.scales import Scale, linear_ticks, log_ticks
from ultrafuser.analysis.svg import drawing, element, line, text

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 8, 36
MOST_POINTS = 120  # of a line: more than the eye tells apart, and neighbours averaged show the trend
LOG_FROM = 8.0  # the ratio of highest to lowest loss from which a linear axis would hide the end of training

Point = tuple[float, float]


def domain_points(points: Sequence[CurvePoint], domain: str) -> list[Point]:
    """Step and loss of one domain, neighbours averaged until at most `MOST_POINTS` are left."""
    known = sorted((point.step, point.loss[domain]) for point in points if domain in point.loss)
    size = -(-len(known) // MOST_POINTS) or 1
    groups = [known[start : start + size] for start in range(0, len(known), size)]
    return [(fmean(step for step, _ in group), fmean(loss for _, loss in group)) for group in groups]


def curve_chart(phase: str, points: Sequence[CurvePoint], colours: Mapping[str, int]) -> Markup:
    """The losses of one phase.

    Args:
        phase: Names the chart.
        points: In any order; a step need not have every domain.
        colours: Palette index of each domain.
    """
    domains = list(dict.fromkeys(domain for point in points for domain in point.loss))
    curves = {domain: domain_points(points, domain) for domain in domains}
    losses = [loss for curve in curves.values() for _, loss in curve]
    steps = [step for curve in curves.values() for step, _ in curve]
    log = min(losses) > 0 and max(losses) / min(losses) > LOG_FROM
    x = Scale(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    y = Scale(min(losses) if log else min(0.0, *losses), max(losses), HEIGHT - BOTTOM, TOP, log)
    ticks = log_ticks(y.low, y.high) if log else linear_ticks(y.low, y.high, 5)
    drawn = [line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid") for tick in ticks]
    drawn += [text(LEFT - 6, y(tick) + 4, f"{tick:g}", anchor="end") for tick in ticks]
    drawn += [
        text(x(tick), HEIGHT - BOTTOM + 16, f"{tick:g}", anchor="middle") for tick in linear_ticks(x.low, x.high, 5)
    ]
    drawn += [
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, f"step{' (loss on a log axis)' if log else ''}", anchor="middle")
    ]
    drawn += [_curve(domain, curve, colours[domain], x, y) for domain, curve in curves.items()]
    return drawing(
        WIDTH, HEIGHT, f"Training loss of {phase} by step, one line for each of: {', '.join(domains)}", *drawn
    )


def _curve(domain: str, curve: Sequence[Point], colour: int, x: Scale, y: Scale) -> Markup:
    places = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in curve)
    if len(curve) == 1:
        (step, loss), *_ = curve
        shape = element("circle", cx=x(step), cy=y(loss), r=3, class_=f"dot s{colour}")
    else:
        shape = element("polyline", points=places, class_=f"curve s{colour}")
    return element("g", element("title", domain), shape)
