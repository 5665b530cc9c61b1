"""Figures drawn by matplotlib: one look, and the same figure gives the same bytes on one version of it.

matplotlib is the extra `plots`; who draws asks `can_draw` first.
"""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ultrafuser.drawing.palette import LIGHT_INK
from ultrafuser.errors import DataError

DOTS_PER_INCH = 150
INK, MUTED = LIGHT_INK.hex, "#585e68"
_SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "ultrafuser",  # else the ids in an SVG are random
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine has it
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
}


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def figure_settings() -> Any:
    """A context in which figures are drawn."""
    from matplotlib import rc_context

    context: Any = rc_context  # its type wants every name of a setting as a literal
    return context(_SETTINGS)


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure as PNG or SVG, by the ending of the path.

    Raises:
        DataError: The file cannot be written.
    """
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[path.suffix[1:]]
    data = io.BytesIO()
    figure.savefig(data, format=path.suffix[1:], dpi=DOTS_PER_INCH, metadata=metadata, bbox_inches="tight")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.getvalue())
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}. Free space or choose another place"
        ) from error
    return path
