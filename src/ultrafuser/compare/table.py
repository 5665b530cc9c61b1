"""The comparison as one Markdown table."""

from __future__ import annotations

from collections.abc import Mapping

from ultrafuser.compare.comparison import Comparison, Row

NONE = "–"
COST_COLUMNS = ("trained", "served", "train s", "ms/token", "weights MB", "peak MB")


def markdown_table(comparison: Comparison) -> str:
    """Models by domains (loss / accuracy in percent; the best of each column in bold), then what each costs."""
    rows = [row for row in comparison.rows if row.skipped is None]
    domains = list(dict.fromkeys(domain for row in rows for domain in row.marks))
    best = {domain: _best(domain, rows) for domain in domains}
    header = ["model", *domains, *COST_COLUMNS]
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    for row in rows:
        marks = [_mark(row.marks.get(domain), best[domain]) for domain in domains]
        lines.append("| " + " | ".join([row.name, *marks, *_cost(row)]) + " |")
    notes = [f"* {row.name}: {row.what}." for row in rows]
    notes += [f"* {row.name}: left out: {row.skipped}" for row in comparison.rows if row.skipped is not None]
    return "\n".join(
        [
            *lines,
            "",
            "Loss in nats per response token / accuracy in percent; the best of each column in bold. Trained, served: "
            "parameters. ms/token: greedy, one conversation at a time. Peak: the most memory held meanwhile, by "
            "tensors on a GPU, else by the whole process, torch and the data included.",
            "",
            *notes,
        ]
    )


def _best(domain: str, rows: list[Row]) -> tuple[float | None, float | None]:
    """Lowest loss and highest accuracy among models that exist (a choice with hindsight is none)."""
    marks = [row.marks[domain] for row in rows if domain in row.marks and row.parameters_served is not None]
    losses = [loss for mark in marks if (loss := mark.get("loss")) is not None]
    accuracies = [accuracy for mark in marks if (accuracy := mark.get("accuracy")) is not None]
    return min(losses, default=None), max(accuracies, default=None)


def _mark(mark: Mapping[str, float | int | None] | None, best: tuple[float | None, float | None]) -> str:
    if mark is None:
        return NONE
    loss, accuracy = mark.get("loss"), mark.get("accuracy")
    shown = [NONE if loss is None else _bold(f"{loss:.3f}", loss == best[0])]
    if accuracy is not None:
        shown.append(_bold(f"{100 * accuracy:.1f}", accuracy == best[1]))
    return " / ".join(shown)


def _bold(text: str, is_best: bool) -> str:
    return f"**{text}**" if is_best else text


def _cost(row: Row) -> list[str]:
    return [
        NONE if row.parameters_trained is None else _count(row.parameters_trained),
        NONE if row.parameters_served is None else _count(row.parameters_served),
        NONE if row.train_s is None else f"{row.train_s:.0f}",
        NONE if row.ms_per_token is None else f"{row.ms_per_token:.1f}",
        NONE if row.weights_bytes is None else f"{row.weights_bytes / 1e6:.1f}",
        NONE if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
    ]


def _count(number: int) -> str:
    return f"{number / 1e6:.2f}M" if number else "0"
