"""The terminal shows the same numbers and the same colours as the report."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table
from rich.text import Text

from test_results import make_results, score
from ultrafuser.analysis.terminal import colour_tokens, legend, scores_table
from ultrafuser.drawing.palette import DARK_INK, DARK_PAGE, LIGHT_INK, LIGHT_PAGE, PALETTE, STRENGTH, Colour


def show(shown: Table | Text, *, colour: bool = False) -> str:
    stream = io.StringIO()
    Console(file=stream, width=120, force_terminal=colour, color_system="truecolor" if colour else None).print(shown)
    return stream.getvalue()


def test_the_table_has_models_by_domains() -> None:
    """Loss and accuracy of each; a domain a model was not measured on is a dash."""
    results = make_results()
    scores = {**results.scores, "average": {"text": score(1.5)}}

    shown = show(scores_table(results.model_copy(update={"scores": scores})))

    assert "0.400 ±0.000" in shown
    assert "75% [75, 75]" in shown
    assert next(line for line in shown.splitlines() if "average" in line).count("–") == 1


def test_the_best_is_bold() -> None:
    """And the second best is not."""
    shown = show(scores_table(make_results()), colour=True)

    assert "\x1b[1m0.400 ±0.000\x1b[0m" in shown
    assert "\x1b[1m0.500 ±0.000" not in shown


def test_names_are_no_markup() -> None:
    """Square brackets mean something to rich; in a model's name they do not."""
    results = make_results(scores={"[red]m": {"text": score(1.0)}}, name="demo")

    assert "[red]m" in show(scores_table(results))


def test_tokens_have_the_colour_of_their_heaviest_specialist() -> None:
    """Stronger where it weighs more; no weights, no colour; the text is unchanged."""
    text = colour_tokens(["def", " f", "!"], [[0.1, 0.9], [0.6, 0.4], []], ["text", "code"])

    styles = [str(span.style) for span in text.spans]
    assert text.plain == "def f!"
    assert styles == [
        f"{LIGHT_INK.hex} on {PALETTE[1].over(LIGHT_PAGE, 0.9 * STRENGTH).hex}",
        f"{LIGHT_INK.hex} on {PALETTE[0].over(LIGHT_PAGE, 0.6 * STRENGTH).hex}",
    ]


def test_without_weights_the_text_is_plain() -> None:
    """A source without a gate gives no rows at all."""
    assert colour_tokens(["a", "b"], [], ["text"]) == Text("ab")


def test_a_model_cannot_write_escape_sequences() -> None:
    """What a model says must not move the cursor or change the title of the window."""
    text = colour_tokens(["\x1b]0;owned\x07", "ok\n\t"], [[1.0], [1.0]], ["text"])

    assert "\x1b" not in text.plain
    assert "\x07" not in text.plain
    assert text.plain.endswith("ok\n\t")


def test_the_legend_names_every_specialist_on_its_colour() -> None:
    """In order, each with another background."""
    shown = legend(["text", "code", "math"])

    assert shown.plain.split() == ["text", "code", "math"]
    assert len({str(span.style) for span in shown.spans}) == 3


def luminance(colour: Colour) -> float:
    channels = [value / 255 for value in colour]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: Colour, other: Colour) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_colour_can_be_seen_and_read_on() -> None:
    """WCAG 2.2 AA in light and dark: 3:1 for shapes on the page, 4.5:1 for text on the strongest background."""
    for colour in PALETTE:
        for page, ink in ((LIGHT_PAGE, LIGHT_INK), (DARK_PAGE, DARK_INK)):
            assert contrast(colour, page) >= 3
            assert contrast(ink, colour.over(page, STRENGTH)) >= 4.5
