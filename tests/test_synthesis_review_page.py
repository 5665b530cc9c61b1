"""The review page in a real browser: what a person does there is what `verdicts.json` says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from page_helpers import real_browser
from ultrafuser.synthesis.dataset.review import read_verdicts
from ultrafuser.synthesis.dataset.review_page import Section, ShownItem, render_review
from ultrafuser.synthesis.node import Item

HOSTILE = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> </p>&amp; '\"{{ 7*7 }}"


def item(key: str, text: str, *, stage: str = "sub_topics", **detail: Any) -> Item:
    return Item(key, f"node-{key}", "root", "text", stage, 0, text, detail, state="kept")


ROOT = item("root", "Cooking", stage="meta_topics")
TOPICS = [item(f"t{number}", f"Topic {number}", relevance=f"relevant {number}") for number in range(3)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with real_browser() as found:
        yield found


@pytest.fixture
def sections() -> list[Section]:
    topics = [ShownItem(topic, [ROOT]) for topic in TOPICS]
    hostile = item("h", HOSTILE, stage="instructions", note=HOSTILE)
    instructions = [ShownItem(hostile, [ROOT, item("p", HOSTILE)], "strike", "bad")]
    return [
        Section("text", "sub_topics", topics, 1100, False),
        Section("text", "instructions", instructions, 1, True),
    ]


@pytest.fixture
def page(browser: Any, tmp_path: Path, sections: list[Section]) -> Iterator[Any]:
    """The page as a file; whatever the test does, nothing may throw or break the policy."""
    path = tmp_path / "review.html"
    path.write_text(render_review('a "<name>"', sections), encoding="utf-8")
    context = browser.new_context(viewport={"width": 1000, "height": 700})
    page = context.new_page()
    page.set_default_timeout(8000)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(f"thrown: {error}"))
    page.goto(path.as_uri())
    yield page
    context.close()
    assert said == []


def saved(page: Any, tmp_path: Path) -> dict[str, Any]:
    with page.expect_download() as download:
        page.locator("#save").click()
    assert download.value.suggested_filename == "verdicts.json"
    download.value.save_as(tmp_path / "verdicts.json")
    read_verdicts(tmp_path / "verdicts.json")
    return json.loads((tmp_path / "verdicts.json").read_text(encoding="utf-8"))


def test_mouse_and_note_become_verdicts(page: Any, tmp_path: Path):
    page.locator("[data-key=t0] .accept").click()
    page.locator("[data-key=t1] .strike").click()
    page.locator("[data-key=t1] .note").fill('too broad, "really"')
    page.locator("[data-key=t2] .accept").click()
    page.locator("[data-key=t2] .accept").click()  # the second click takes it back
    page.locator(".approve").first.check()

    assert page.locator("#count").text_content() == "1 accepted, 2 struck, 1 open · not saved"
    assert saved(page, tmp_path) == {
        "synthesis": 'a "<name>"',
        "verdicts": [
            {"item": "t0", "verdict": "accept", "note": ""},
            {"item": "t1", "verdict": "strike", "note": 'too broad, "really"'},
            {"item": "h", "verdict": "strike", "note": "bad"},
        ],
        "approved": [{"domain": "text", "stage": "sub_topics"}, {"domain": "text", "stage": "instructions"}],
    }
    assert page.locator("#count").text_content() == "1 accepted, 2 struck, 1 open"


def test_the_keyboard_alone_is_enough(page: Any, tmp_path: Path):
    keyboard = page.keyboard
    for key in ["j", "a", "j", "x", "n"]:
        keyboard.press(key)
    keyboard.type("jaxun")  # letters in a note are letters
    for key in ["Escape", "j", "x", "u", "k", "k", "k"]:
        keyboard.press(key)

    assert page.evaluate("document.activeElement.dataset.key") == "t0"
    assert [(v["item"], v["verdict"], v["note"]) for v in saved(page, tmp_path)["verdicts"]] == [
        ("t0", "accept", ""),
        ("t1", "strike", "jaxun"),
        ("h", "strike", "bad"),
    ]


def test_text_stays_text(page: Any):
    assert page.title() == 'Review of a "<name>"'
    assert page.locator("[data-key=h] .words").text_content() == HOSTILE
    assert page.locator("[data-key=h] dd").text_content() == HOSTILE
    assert page.locator("[data-key=h] .path").text_content().startswith("Cooking › <script>")
    assert page.locator("main script, main img").count() == 0


def test_no_script_but_its_own_runs(browser: Any, tmp_path: Path, sections: list[Section]):
    """Were something not escaped, the policy would still stand in its way."""
    path = tmp_path / "review.html"
    inline = "<script>document.title = 'taken'</script></main>"
    path.write_text(render_review("run", sections).replace("</main>", inline), encoding="utf-8")
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(path.as_uri())

    assert page.title() == "Review of run"
    assert any("Content Security Policy" in line for line in said)
    assert page.locator("#count").text_content() == "0 accepted, 1 struck, 3 open"  # the page's own script did run
    page.close()


def test_a_reload_keeps_what_was_not_saved(page: Any):
    page.locator("[data-key=t2] .strike").click()
    page.locator("[data-key=t2] .note").fill("why")
    page.on("dialog", lambda dialog: dialog.accept())  # the browser asks before it leaves
    # Nobody reloads in the millisecond of the last key; once, on a busy machine, it was lost.
    page.wait_for_timeout(500)
    page.reload()

    assert page.locator("[data-key=t2]").get_attribute("data-verdict") == "strike"
    assert page.locator("[data-key=t2] .note").input_value() == "why"


def test_a_sample_of_nothing_is_a_page_that_says_so(browser: Any, tmp_path: Path):
    path = tmp_path / "empty.html"
    path.write_text(render_review("empty", [Section("text", "sub_topics", [], 0, False)]), encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())

    assert page.locator("#count").text_content() == "0 accepted, 0 struck, 0 open"
    assert "0 of 0" in page.locator("main").text_content()
    page.close()


def test_the_page_fits_a_phone(browser: Any, tmp_path: Path, sections: list[Section]):
    path = tmp_path / "review.html"
    path.write_text(render_review("run", sections), encoding="utf-8")
    page = browser.new_page(viewport={"width": 360, "height": 700})
    page.goto(path.as_uri())

    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.close()
