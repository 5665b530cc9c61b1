"""Results in a terminal: the table of scores, and tokens coloured by specialist.

A coloured token sets ink and background both, so it reads the same on a dark and on a light terminal; where
colours are off, as in a pipe, only the text is left.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from ultrafuser.analysis.results import FUSED_PREFIX, Results, Score
from ultrafuser.analysis.summary import accuracy_interval, best_models, percent
from ultrafuser.drawing.palette import LIGHT_INK, LIGHT_PAGE, PALETTE, STRENGTH, colour_indices, heaviest

# A model may write escape sequences that would move the cursor or worse; line ends and tabs are harmless.
_CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def scores_table(results: Results) -> Table:
    """Models by domains: loss ± half its 95% interval, and accuracy with its interval; the best in bold."""
    table = Table(
        title=results.name,
        caption="loss in nats per token ± half of its 95% interval; accuracy with its 95% interval; bold: the best",
    )
    table.add_column("model", no_wrap=True)
    for domain in results.domains:
        table.add_column(domain, justify="right", no_wrap=True)
    best = {domain: best_models(results, domain) for domain in results.domains}
    for model, scores in results.scores.items():
        cells = [
            _cell(scores.get(domain), model in best[domain].loss, model in best[domain].accuracy)
            for domain in results.domains
        ]
        table.add_row(Text(model, style="bold" if model.startswith(FUSED_PREFIX) else ""), *cells)
    return table


def colour_tokens(texts: Sequence[str], weights: Sequence[Sequence[float]], specialists: Sequence[str]) -> Text:
    """Tokens, each on the colour of its heaviest specialist, the stronger the heavier (Figures 8 and 9).

    Args:
        texts: The text of each token.
        weights: The gate weights of each token; an empty list, or an empty row, leaves tokens uncoloured.
        specialists: Names in the order of the weights.
    """
    text = Text()
    for token, row in zip(texts, weights or [()] * len(texts), strict=True):
        text.append(token.translate(_CONTROLS), style=_style(specialists, heaviest(row), max(row)) if row else "")
    return text


def legend(specialists: Sequence[str]) -> Text:
    """The name of each specialist on its colour."""
    return Text(" ").join(
        Text(f" {name.translate(_CONTROLS)} ", style=_style(specialists, index, 1.0))
        for index, name in enumerate(specialists)
    )


def _style(specialists: Sequence[str], index: int, weight: float) -> str:
    colour = PALETTE[colour_indices(specialists)[specialists[index]]]
    return f"{LIGHT_INK.hex} on {colour.over(LIGHT_PAGE, min(1.0, weight) * STRENGTH).hex}"


def _cell(score: Score | None, best_loss: bool, best_accuracy: bool) -> Text:
    if score is None:
        return Text("–")
    half = (score.loss_high - score.loss_low) / 2
    cell = Text(f"{score.loss:.3f} ±{half:.3f}", style="bold" if best_loss else "")
    if score.accuracy is None:
        return cell
    accuracy = Text(f"{percent(score.accuracy)} {accuracy_interval(score)}", style="bold" if best_accuracy else "")
    return Text("\n").join([cell, accuracy])
