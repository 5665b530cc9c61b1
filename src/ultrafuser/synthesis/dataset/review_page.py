"""The review page: one HTML file that needs no other and runs no script but its own.

Instructions may hold HTML or JavaScript: the template escapes whatever is put into it, and the page's policy names the
hash of the one script that may run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Literal, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ultrafuser.synthesis.node import Item
from ultrafuser.synthesis.recipe import StageName

VerdictWord = Literal["accept", "strike"]


class ShownItem(NamedTuple):
    """An item on the page: its ancestors, the root first, and what was said of it before."""

    item: Item
    ancestors: Sequence[Item]
    verdict: VerdictWord | None = None
    note: str = ""


class Section(NamedTuple):
    """A stage of a domain on the page; `total` counts its items in use."""

    domain: str
    stage: StageName
    items: Sequence[ShownItem]
    total: int
    is_approved: bool


def render_review(name: str, sections: Sequence[Section]) -> str:
    """The page as HTML.

    Args:
        name: Of the synthesis.
        sections: Domains and stages with their samples.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals["words"] = lambda text: str(text).replace("_", " ")
    script = _resource("review.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.from_string(_resource("review.html.j2")).render(
        name=name,
        sections=sections,
        style=Markup(_resource("review.css")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )


def _resource(name: str) -> str:
    return files("ultrafuser.synthesis.dataset").joinpath(name).read_text(encoding="utf-8")
