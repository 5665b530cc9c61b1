"""From values to places on a chart, and the round numbers an axis shows."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, log10

Number = int | float  # in full: a run-time check of types takes `float` at its word

_TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps `low`..`high` to `start`..`end`; `log` spaces by ratio, for values above zero that span decades."""

    low: Number
    high: Number
    start: Number
    end: Number
    log: bool = False

    def __call__(self, value: Number) -> float:
        """The place of a value, kept within the chart."""
        low, high, at = (log10(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        share = (at - low) / (high - low) if high > low else 0.0
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)


def linear_ticks(low: Number, high: Number, at_most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, within low..high."""
    if high <= low:
        return [float(low)]
    rough = (high - low) / at_most
    power = 10.0 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - _TOLERANCE))
    first, last = ceil(low / step - _TOLERANCE), floor(high / step + _TOLERANCE)
    return [float(f"{index * step:.10g}") for index in range(first, last + 1)]


def log_ticks(low: Number, high: Number) -> list[float]:
    """1, 2 and 5 times powers of ten within low..high; only the powers where that would be many."""
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    fine = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5) if low <= digit * 10.0**power <= high]
    coarse = [tick for tick in fine if f"{tick:e}"[0] == "1"]
    return fine if len(fine) <= 7 or len(coarse) < 2 else coarse
