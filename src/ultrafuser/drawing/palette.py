"""The palette: one colour per specialist, the same in every chart, page and terminal.

Blue, vermilion and green are Okabe and Ito's; each of the rest is as far as could be from those before it as
colour-blind readers see them (Machado et al. 2009). All have at least 3:1 against the light page and the dark one
(WCAG 2.2, 1.4.11), so both modes share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Colour(NamedTuple):
    """Red, green, blue, each 0..255."""

    red: int
    green: int
    blue: int

    @property
    def hex(self) -> str:
        """As `#rrggbb`."""
        return f"#{self.red:02x}{self.green:02x}{self.blue:02x}"

    def over(self, background: Colour, opacity: float) -> Colour:
        """What one sees of this colour, laid over a background with an opacity of 0..1."""
        mixed = (round(top * opacity + below * (1 - opacity)) for top, below in zip(self, background, strict=True))
        return Colour(*mixed)


PALETTE = (
    Colour(0, 114, 178),  # blue
    Colour(213, 94, 0),  # vermilion
    Colour(0, 158, 115),  # bluish green
    Colour(144, 40, 240),  # violet
    Colour(228, 0, 72),  # crimson
    Colour(104, 108, 140),  # slate
)
LIGHT_PAGE, LIGHT_INK = Colour(255, 255, 255), Colour(22, 24, 29)
DARK_PAGE, DARK_INK = Colour(20, 22, 26), Colour(236, 238, 242)

# A background at a weight of 1 has this opacity: strong enough to see, weak enough to read the text on it.
STRENGTH = 0.6


def colour_indices(specialists: Sequence[str], others: Iterable[str] = ()) -> dict[str, int]:
    """An index into the palette for each name: specialists first, then others (a mixed domain, say).

    A domain named like a specialist gets its colour. With more names than colours they come round again; every
    chart also writes the name.
    """
    names = dict.fromkeys([*specialists, *others])
    return {name: index % len(PALETTE) for index, name in enumerate(names)}


def heaviest(weights: Sequence[float]) -> int:
    """The position of the heaviest weight, the first of equals."""
    return max(range(len(weights)), key=weights.__getitem__)


def weights_text(weights: Sequence[float], specialists: Sequence[str]) -> str:
    """All weights of one token in words: `text 0.81 · code 0.12 · math 0.07`."""
    return " · ".join(f"{name} {weight:.2f}" for name, weight in zip(specialists, weights, strict=True))
