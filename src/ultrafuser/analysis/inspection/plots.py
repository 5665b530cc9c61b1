"""Figures as PNG and SVG, drawn by matplotlib: the same finding gives the same bytes on one version of it.

matplotlib is the extra `plots`; where it is missing there are no figures, and everything else is as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ultrafuser.analysis.inspection.findings import Finding, Part, Table
from ultrafuser.analysis.scales import linear_ticks, log_ticks
from ultrafuser.drawing.figures import INK, figure_settings, save_figure
from ultrafuser.drawing.palette import PALETTE, STRENGTH, colour_indices

INSTALL = "no PNG or SVG figures without matplotlib: pip install 'ultrafuser[plots]'"


def write_plots(finding: Finding, folder: Path) -> list[Path]:
    """Draw a finding as `<part>.png` and `<part>.svg`; returns their paths, none where there is nothing to draw.

    Raises:
        DataError: A file cannot be written.
    """
    draw = _DRAW.get(finding.part)
    if draw is None:
        return []
    with figure_settings():
        figure = draw(finding)
        if figure is None:
            return []
        return [save_figure(figure, folder / f"{finding.part}.{ending}") for ending in ("png", "svg")]


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # not pyplot: no windows, no figures kept open

    figure: Any = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _colour(finding: Finding, name: str) -> str:
    return PALETTE[colour_indices(finding.specialists, finding.domains)[name]].hex


def _plot_losses(finding: Finding) -> Any:
    """Rows: models; columns: domains; each column is shaded on its own, the lowest loss darkest."""
    table = finding.tables[0]
    figure, (axes,) = _figure(1.8 + 1.1 * len(finding.domains), 0.7 + 0.36 * len(table.rows))
    shades = []
    for column in range(1, len(table.columns)):
        losses = [float(row[column] or 0.0) for row in table.rows]
        low, high = min(losses), max(losses)
        shades.append([1 - (loss - low) / (high - low) if high > low else 1.0 for loss in losses])
    _cells(axes, table, list(zip(*shades, strict=True)), "{:.3f}", lambda _row, _column: PALETTE[0].hex)
    axes.set_title("loss, nats per response token", loc="left")
    return figure


def _plot_gate(finding: Finding) -> Any:
    table = finding.tables[0]
    figure, (axes,) = _figure(1.5 + 1.1 * len(finding.specialists), 0.7 + 0.36 * len(table.rows))
    shades = [[float(value or 0.0) for value in row[1:]] for row in table.rows]
    _cells(axes, table, shades, "{:.2f}", lambda _row, column: _colour(finding, finding.specialists[column]))
    axes.set_title("mean gate weight", loc="left")
    return figure


def _cells(axes: Any, table: Table, shades: Any, style: str, colour: Callable[[int, int], str]) -> None:
    """A table whose cells have a background, the stronger the higher its shade."""
    from matplotlib.patches import Rectangle

    num_columns = len(table.columns) - 1
    for r, row in enumerate(table.rows):
        for c in range(num_columns):
            axes.add_patch(
                Rectangle((c, r), 0.97, 0.94, color=colour(r, c), alpha=STRENGTH * min(1.0, shades[r][c]), linewidth=0)
            )
            value = row[c + 1]
            axes.text(c + 0.485, r + 0.47, style.format(value) if value is not None else "–", ha="center", va="center")
    axes.set_xlim(0, num_columns)
    axes.set_ylim(len(table.rows), 0)
    axes.set_xticks([c + 0.485 for c in range(num_columns)], table.columns[1:])
    axes.set_yticks([r + 0.47 for r in range(len(table.rows))], [_plain(row[0]) for row in table.rows])
    axes.tick_params(length=0, labelcolor=INK)
    axes.tick_params(axis="x", top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)


def _plot_heatmap(finding: Finding) -> Any:
    """One panel per domain, side by side as Figure 6: samples by specialists."""
    if finding.heatmap is None or not finding.heatmap.rows:
        return None
    from matplotlib.colors import LinearSegmentedColormap

    names = finding.heatmap.specialists
    figure, panels = _figure(1.2 + 1.6 * len(finding.domains), 3.4, 1, len(finding.domains))
    for axes, domain in zip(panels, finding.domains, strict=True):
        rows = [row.weights for row in finding.heatmap.rows if row.domain == domain]
        for column, name in enumerate(names):
            scale = LinearSegmentedColormap.from_list(name, ["#ffffff", _colour(finding, name)])
            axes.imshow(
                [[row[column]] for row in rows],
                cmap=scale,
                vmin=0,
                vmax=1,
                aspect="auto",
                interpolation="nearest",
                extent=(column + 0.02, column + 0.98, len(rows) + 0.5, 0.5),
            )
        axes.set_xlim(0, len(names))
        axes.set_ylim(len(rows) + 0.5, 0.5)
        axes.set_xticks([column + 0.5 for column in range(len(names))], [_plain(name) for name in names])
        axes.set_yticks([1, len(rows)] if len(rows) > 1 else [1])
        axes.tick_params(length=0)
        axes.set_title(_plain(domain))
        axes.spines[:].set_visible(False)
    panels[0].set_ylabel("sample")
    return figure


def _plot_curves(finding: Finding) -> Any:
    columns = min(3, len(finding.curves))
    rows = -(-len(finding.curves) // columns)
    figure, panels = _figure(0.6 + 3.0 * columns, 0.5 + 2.1 * rows, rows, columns)
    for axes, (phase, points) in zip(panels, finding.curves.items(), strict=False):
        for domain in finding.domains:
            colour = _colour(finding, domain)
            line = [(point.step, point.loss[domain]) for point in points if domain in point.loss]
            dots = [(p.step, p.loss[domain]) for p in finding.validation.get(phase, []) if domain in p.loss]
            if line:
                axes.plot(*zip(*line, strict=True), color=colour, linewidth=1.2, label=_plain(domain))
            if dots:
                axes.plot(*zip(*dots, strict=True), "o", color=colour, markersize=3.5, markeredgecolor="white")
        _scale_losses(axes, [loss for point in points for loss in point.loss.values()])
        axes.set_title(_plain(phase))
        axes.set_xticks(linear_ticks(points[0].step, points[-1].step, 4))
    for axes in panels[len(finding.curves) :]:
        axes.set_visible(False)
    panels[0].set_ylabel("loss, nats per token")
    known = dict(zip(*reversed(_handles(panels)), strict=True))
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=max(1, len(known)))
    return figure


def _scale_losses(axes: Any, losses: list[float]) -> None:
    """A log axis with plain numbers, where losses allow it and span enough for two of them."""
    low, high = min(losses), max(losses)
    if low > 0 and len(ticks := log_ticks(low, high)) > 1:
        axes.set_yscale("log")
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()


def _handles(panels: list[Any]) -> tuple[list[Any], list[str]]:
    handles: list[Any] = []
    labels: list[str] = []
    for axes in panels:
        more, names = axes.get_legend_handles_labels()
        handles += more
        labels += names
    return handles, labels


def _plot_stability(finding: Finding) -> Any:
    """Mean and deviation of the validation loss, one panel per phase."""
    table = finding.tables[0]
    phases = list(dict.fromkeys(row[0] for row in table.rows))
    if not phases:
        return None
    columns = min(4, len(phases))
    rows = -(-len(phases) // columns)
    figure, panels = _figure(0.6 + 2.0 * columns, 0.3 + 1.9 * rows, rows, columns)
    for axes, phase in zip(panels, phases, strict=False):
        chosen = [row for row in table.rows if row[0] == phase]
        for place, (_, domain, _, mean, deviation) in enumerate(chosen):
            colour = _colour(finding, str(domain))
            axes.errorbar([place], [mean], yerr=[deviation or 0.0], fmt="o", color=colour, capsize=4, markersize=4)
        axes.set_xticks(range(len(chosen)), [_plain(row[1]) for row in chosen])
        axes.set_xlim(-0.5, len(chosen) - 0.5)
        axes.set_ylim(bottom=0)
        axes.set_title(f"{_plain(phase)} (n = {chosen[0][2]})")
    for axes in panels[len(phases) :]:
        axes.set_visible(False)
    panels[0].set_ylabel("validation loss")
    return figure


def _plot_embeddings(finding: Finding) -> Any:
    if not finding.points:
        return None
    figure, (axes,) = _figure(4.6, 4.2)
    for domain, marker in zip(finding.domains, "o^sDvP" * len(finding.domains), strict=False):
        chosen = [(point.x, point.y) for point in finding.points if point.domain == domain]
        x, y = zip(*chosen, strict=True)
        colour = _colour(finding, domain)
        axes.scatter(x, y, s=12, marker=marker, color=colour, alpha=0.75, linewidths=0, label=_plain(domain))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_aspect("equal")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=min(4, len(finding.domains)))
    return figure


def _plain(name: object) -> str:
    """A name as it is: matplotlib would read what stands between dollar signs as mathematics."""
    return str(name).replace("$", r"\$")


_DRAW: dict[Part, Callable[[Finding], Any]] = {
    "losses": _plot_losses,
    "gate": _plot_gate,
    "heatmap": _plot_heatmap,
    "curves": _plot_curves,
    "stability": _plot_stability,
    "embeddings": _plot_embeddings,
}
