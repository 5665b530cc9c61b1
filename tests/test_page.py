"""The chat page's files: shipped with the package, nothing but text from a model, the palette of all other charts."""

import re
from html.parser import HTMLParser

import pytest

from page_helpers import PAGE
from ultrafuser.drawing.palette import DARK_INK, DARK_PAGE, LIGHT_INK, LIGHT_PAGE, PALETTE, Colour

SCRIPTS = {file.name: file.read_text(encoding="utf-8") for file in PAGE.iterdir() if file.name.endswith(".js")}
STYLE = (PAGE / "style.css").read_text(encoding="utf-8")
HTML = (PAGE / "index.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Every element with its attributes, and whether scripts or styles stand inside the page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] in ("script", "style") and data.strip():
            self.inside.append(data)


def elements() -> Elements:
    parser = Elements()
    parser.feed(HTML)
    return parser


def test_the_package_carries_the_page():
    assert {"index.html", "style.css", "icon.svg", "script.js"} <= {file.name for file in PAGE.iterdir()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_makes_markup_or_code_of_text(name: str):
    ways = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|srcdoc|setHTML"
        r"|\beval\b|\bFunction\(|javascript:|setAttribute\(\s*[\"']on"
    )

    assert re.findall(ways, SCRIPTS[name]) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_module_that_is_imported_is_there(name: str):
    assert set(re.findall(r'from "\./([\w.]+)"', SCRIPTS[name])) <= set(SCRIPTS)


def test_the_page_has_no_script_or_style_inside_and_loads_nothing_from_elsewhere():
    page = elements()
    addresses = [
        value for _, attributes in page.found for key, value in attributes.items() if key in ("src", "href", "action")
    ]
    handlers = [key for _, attributes in page.found for key in attributes if key.startswith("on") or key == "style"]

    assert page.inside == []
    assert handlers == []
    assert [address for address in addresses if not re.match(r"#|page/[\w.]+$", address or "")] == []
    assert re.findall(r"url\(|@import", STYLE) == []
    assert [text for text in SCRIPTS.values() if re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)] == []


def test_every_control_has_a_name():
    page = elements()
    labelled = {attributes.get("for") for tag, attributes in page.found if tag == "label"}
    bare = [
        attributes
        for tag, attributes in page.found
        if tag in ("input", "textarea", "select")
        and attributes.get("id") not in labelled
        and not re.search(
            rf'<label[^>]*>(?:(?!</label>).)*(?:id|name)="{attributes.get("id") or attributes["name"]}"', HTML
        )
    ]

    assert bare == []


def test_the_colours_are_those_of_every_other_chart():
    colours = re.findall(r"^\.s(\d) \{ --c: (\d+) (\d+) (\d+); --line: (\w+);", STYLE, re.MULTILINE)
    lines = [line for *_, line in colours]

    assert [Colour(*map(int, rgb)) for _, *rgb, _ in colours] == list(PALETTE)
    assert len(set(lines[:5])) == 5, "colour must not be the only sign"


@pytest.mark.parametrize(("page", "ink"), [(LIGHT_PAGE, LIGHT_INK), (DARK_PAGE, DARK_INK)], ids=["light", "dark"])
def test_text_on_the_strongest_colour_can_be_read(page: Colour, ink: Colour):
    """WCAG 2.2, 1.4.3: 4.5 to 1."""
    strength = float(re.search(r"--strength: ([\d.]+)", STYLE)[1])  # type: ignore[index]

    assert f"{page.red} {page.green} {page.blue}" in STYLE
    assert min(contrast(ink, colour.over(page, strength)) for colour in PALETTE) >= 4.5


def contrast(one: Colour, other: Colour) -> float:
    """The contrast ratio of WCAG 2.2."""
    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def luminance(colour: Colour) -> float:
    parts = [value / 255 for value in colour]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
