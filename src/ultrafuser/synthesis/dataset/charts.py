"""The data set in pictures, drawn by matplotlib (the extra `plots`): lengths, topics, a map of instructions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultrafuser.drawing.figures import INK, MUTED, figure_settings, save_figure
from ultrafuser.drawing.palette import PALETTE
from ultrafuser.synthesis.dataset.diversity import Place
from ultrafuser.synthesis.dataset.measure import DomainNumbers, Lengths

MARKERS = "o^sDvP"
BINS = 40
MOST_TOPICS = 30


def draw_lengths(domains: Sequence[DomainNumbers], unit: str, path: Path) -> None:
    """Instructions and responses by length, one panel per domain; up to the 99th in a hundred.

    Raises:
        DataError: The file cannot be written.
    """
    with figure_settings():
        figure, panels = _figure(3.2 * len(domains), 2.6, len(domains))
        for axes, domain, colour in zip(panels, domains, _colours(len(domains)), strict=True):
            for lengths, name, style in (
                (domain.instruction, "instruction", {"color": MUTED, "alpha": 0.55}),
                (domain.response, "response", {"color": colour, "alpha": 0.55}),
            ):
                values, weights = zip(*lengths.histogram, strict=True)
                axes.hist(values, weights=weights, bins=BINS, range=(0, _cut(domain)), label=name, **style)
            axes.set_title(_plain(f"{domain.domain} ({domain.records:,} records)"))
            axes.set_xlabel(unit)
            axes.legend()
        panels[0].set_ylabel("texts")
        save_figure(figure, path)


def draw_topics(domains: Sequence[DomainNumbers], path: Path) -> None:
    """Records by meta-topic, one panel per domain, the largest topics.

    Raises:
        DataError: The file cannot be written.
    """
    with figure_settings():
        longest = max(min(MOST_TOPICS, len(domain.meta_topics)) for domain in domains)
        figure, panels = _figure(3.6 * len(domains), 0.8 + 0.17 * longest, len(domains))
        for axes, domain, colour in zip(panels, domains, _colours(len(domains)), strict=True):
            shown = list(domain.meta_topics.items())[:MOST_TOPICS]
            names = [_plain(name if len(name) <= 32 else name[:31] + "…") for name, _ in shown]
            axes.barh(range(len(shown)), [number for _, number in shown], color=colour)
            axes.set_yticks(range(len(shown)), names)
            axes.set_ylim(longest - 0.5, -0.5)
            axes.tick_params(axis="y", length=0, labelsize=7, labelcolor=INK)
            axes.set_title(_plain(f"{domain.domain}: records by meta-topic"))
        save_figure(figure, path)


def draw_map(places: Sequence[Place], by: str, silhouette: float | None, path: Path) -> None:
    """Instructions on a map, by domain (Figure 3).

    Raises:
        DataError: The file cannot be written.
    """
    domains = list(dict.fromkeys(place.domain for place in places))
    with figure_settings():
        figure, (axes,) = _figure(4.8, 4.6, 1)
        for domain, colour, marker in zip(domains, _colours(len(domains)), MARKERS * len(domains), strict=False):
            x, y = zip(*[(place.x, place.y) for place in places if place.domain == domain], strict=True)
            axes.scatter(x, y, s=8, marker=marker, color=colour, alpha=0.7, linewidths=0, label=_plain(domain))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        score = "" if silhouette is None else f"silhouette {silhouette:.2f}; "
        axes.set_title(_plain(f"{score}by {by.partition(':')[0]}"))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=min(4, len(domains)))
        save_figure(figure, path)


def _cut(domain: DomainNumbers) -> int:
    return max(1, *(_percentile(lengths, 0.99) for lengths in (domain.instruction, domain.response)))


def _percentile(lengths: Lengths, share: float) -> int:
    wanted, seen = share * sum(number for _, number in lengths.histogram), 0
    for length, number in lengths.histogram:
        seen += number
        if seen >= wanted:
            return length
    return lengths.longest


def _figure(width: float, height: float, columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # not pyplot: no windows, no figures kept open

    figure: Any = Figure(figsize=(max(width, 3.6), height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False).flat)


def _colours(number: int) -> list[str]:
    return [PALETTE[index % len(PALETTE)].hex for index in range(number)]


def _plain(name: str) -> str:
    """A name as it is: matplotlib would read what stands between dollar signs as mathematics."""
    return name.replace("$", r"\$")
