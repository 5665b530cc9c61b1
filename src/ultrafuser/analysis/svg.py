"""SVG elements as escaped text: whatever is not markup already cannot become markup."""

from __future__ import annotations

from markupsafe import Markup, escape

from ultrafuser.analysis.scales import Number


def element(tag: str, *children: Markup | str, **attributes: str | Number) -> Markup:
    """One element with its children.

    Args:
        tag: Its name.
        children: Elements, or text, which is escaped.
        attributes: A trailing underscore is dropped and others become hyphens: `class_`, `text_anchor`.
    """
    rendered = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_number(value))}"' for name, value in attributes.items()
    )
    return Markup("<{}{}>{}</{}>").format(tag, Markup(rendered), Markup("").join(children), tag)


def drawing(width: Number, height: Number, title: str, *children: Markup) -> Markup:
    """A whole drawing, as wide as there is room for; the title is what a screen reader says."""
    return element(
        "svg",
        element("title", title),
        *children,
        role="img",
        aria_label=title,
        viewBox=f"0 0 {_number(width)} {_number(height)}",
        xmlns="http://www.w3.org/2000/svg",
    )


def text(x: Number, y: Number, content: str, *, anchor: str = "start", class_: str = "label") -> Markup:
    """A line of text; `anchor` is start, middle or end."""
    return element("text", content, x=x, y=y, text_anchor=anchor, class_=class_)


def line(x1: Number, y1: Number, x2: Number, y2: Number, class_: str) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def _number(value: str | Number) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
