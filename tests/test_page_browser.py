"""The chat page in a real browser, against a server that a test scripts."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from page_helpers import NAMES, Reply, ScriptedServer, real_browser, scripted_server

WEIGHTS = (0.12, 0.83, 0.05)
TOKENS = [("Use", WEIGHTS), (" a", (0.6, 0.3, 0.1)), (" loop", (0.1, 0.2, 0.7)), (".", (0.9971, 0.0029, 0.0))]
HARMLESS = ("the server responded with a status of", "net::ERR_")  # Chromium's own words for a refused request


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with real_browser() as found:
        yield found


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as running:
        yield running


Opener = Callable[..., Any]


@pytest.fixture
def visit(browser: Any, server: ScriptedServer) -> Iterator[Opener]:
    """Opens the page; whatever the test does, nothing may break the policy, throw, or open a dialog."""
    said: list[str] = []
    contexts = []

    def open_page(**options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **options})
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(8000)
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"thrown: {error}"))
        page.on("dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(server.address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [line for line in said if not any(words in line for words in HARMLESS)] == []


@pytest.fixture
def page(visit: Opener) -> Any:
    return visit()


def send(page: Any, question: str = "How?") -> None:
    page.locator("#model").filter(has_text="demo").wait_for()
    page.locator("#question").fill(question)
    page.locator("#question").press("Enter")


def finished(page: Any) -> None:
    """Wait until the page can be asked again."""
    page.locator("#send").wait_for()


def ask(page: Any, question: str = "How?") -> None:
    send(page, question)
    finished(page)


def text_of(page: Any, selector: str = ".turn:last-child .answer .tokens") -> str:
    return str(page.locator(selector).first.text_content())


def await_text(page: Any, selector: str, text: str) -> None:
    page.locator(selector).filter(has_text=text).first.wait_for()


# Streaming.


def test_an_answer_appears_piece_by_piece_in_the_colours_of_its_specialists(page: Any, server: ScriptedServer):
    server.replies = [Reply(TOKENS, held=True)]
    send(page)
    seen = []
    for count in range(1, len(TOKENS) + 1):
        server.release()
        page.wait_for_function("n => document.querySelectorAll('.token').length === n", arg=count)
        seen.append(text_of(page))
    finished(page)

    assert seen == ["Use", "Use a", "Use a loop", "Use a loop."]
    tokens = page.locator(".token")
    backgrounds = [tokens.nth(n).evaluate("node => getComputedStyle(node).backgroundColor") for n in range(4)]
    lines = [tokens.nth(n).evaluate("node => getComputedStyle(node).textDecorationStyle") for n in range(3)]
    strength = float(page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--strength')"))
    assert re.match(r"rgba\(213, 94, 0, ", backgrounds[0])
    assert float(backgrounds[0].split()[-1].rstrip(")")) == pytest.approx(0.83 * strength, abs=0.01)
    assert re.match(r"rgba\(0, 114, 178, ", backgrounds[1])
    assert re.match(r"rgba\(0, 158, 115, ", backgrounds[2])
    assert lines == ["dashed", "solid", "dotted"]


def test_the_whole_conversation_is_sent_and_all_settings_with_it(page: Any, server: ScriptedServer):
    fields = {"temperature": "0.7", "top_p": "0.9", "top_k": "40", "min_p": "0.05", "max_tokens": "99", "seed": "3"}
    for name, value in fields.items():
        page.locator(f"[name={name}]").fill(value)
    page.locator("[name=stop]").fill("\\n\\n\nEND")
    page.locator("[name=system]").fill("Be brief.")
    ask(page, "one")
    ask(page, "two")

    assert server.bodies[-1] == {
        "model": "demo",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "Good day"},
            {"role": "user", "content": "two"},
        ],
        "temperature": 0.7,
        "max_tokens": 99,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "seed": 3,
        "stop": ["\n\n", "END"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "fusion": {"weights": True},
    }


def test_a_setting_that_makes_no_sense_is_not_sent(page: Any, server: ScriptedServer):
    page.locator("[name=top_p]").fill("1.5")
    send(page)
    page.locator("[name=top_p]:invalid").wait_for()

    assert server.bodies == []


def test_a_new_chat_forgets(page: Any, server: ScriptedServer):
    ask(page, "one")
    page.get_by_role("button", name="New chat").click()
    assert page.locator("#empty").is_visible()
    ask(page, "two")

    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "two"}]
    assert page.locator(".turn").count() == 1


def test_each_question_can_stand_for_itself(page: Any, server: ScriptedServer):
    page.get_by_label("Forget what was said before each question").check()
    ask(page, "one")
    ask(page, "two")

    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "two"}]


def test_code_is_monospaced_and_prose_is_not(page: Any, server: ScriptedServer):
    """Between fences, with both of them; without fences where a line is indented and no item of a list."""
    pieces = ["So: ", "``", "`py", "\nx\n", "```", "\nDone."]
    server.replies = [
        Reply([(piece, WEIGHTS) for piece in pieces]),
        Reply([("def f():\n", WEIGHTS), ("    return 1", WEIGHTS)]),
        Reply([("- one\n", WEIGHTS), ("  - two", WEIGHTS)]),
    ]
    for _ in range(3):
        ask(page)
    fonts = page.locator(".token").evaluate_all("it => it.map((token) => getComputedStyle(token).fontFamily)")

    assert [font.startswith("ui-monospace") for font in fonts] == [
        *(False, False, True, True, True, False),
        *(True, True),
        *(False, False),
    ]


def test_an_example_can_be_asked(page: Any, server: ScriptedServer):
    example = page.locator(".example").first
    question = example.text_content()
    page.locator("#model").filter(has_text="demo").wait_for()
    example.click()
    finished(page)

    assert server.bodies[-1]["messages"] == [{"role": "user", "content": question}]


def test_regenerate_asks_the_last_question_again(page: Any, server: ScriptedServer):
    server.replies = [Reply(), Reply(), Reply([("Better", WEIGHTS)])]
    ask(page, "one")
    ask(page, "two")
    again = page.get_by_role("button", name="Regenerate").filter(visible=True)
    assert again.count() == 1
    again.click()
    await_text(page, ".tokens", "Better")

    assert server.bodies[-1] == server.bodies[-2]
    assert [text_of(page, f".turn:nth-child({n}) .tokens") for n in (1, 2)] == ["Good day", "Better"]


def test_stop_ends_the_request_and_keeps_what_has_come(page: Any, server: ScriptedServer):
    server.replies = [Reply([(f"{n} ", WEIGHTS) for n in range(50)], held=True)]
    send(page)
    server.release(2)
    await_text(page, ".tokens", "0 1 ")
    page.get_by_role("button", name="Stop").click()
    server.await_gone(1)
    finished(page)

    assert text_of(page) == "0 1 "
    assert page.locator(".note").first.text_content().startswith("stopped · 2 tokens")
    assert page.locator("#notice").is_hidden()
    ask(page, "go on")
    assert {"role": "assistant", "content": "0 1 "} in server.bodies[-1]["messages"]


def test_escape_stops_too(page: Any, server: ScriptedServer):
    server.replies = [Reply(held=True)]
    send(page)
    page.keyboard.press("Escape")
    server.await_gone(1)
    finished(page)


def test_2000_tokens_at_once_cost_little_time(page: Any, server: ScriptedServer):
    """Time of the page's own thread on a processor, so that a busy machine changes little. Measured: 0.8 s."""
    server.replies = [Reply([(f"word{n} ", WEIGHTS if n % 3 else (0.7, 0.2, 0.1)) for n in range(2000)])]
    page.locator("#model").filter(has_text="demo").wait_for()
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def seconds() -> float:
        figures = session.send("Performance.getMetrics")["metrics"]
        return float(next(figure["value"] for figure in figures if figure["name"] == "TaskDuration"))

    before = seconds()
    ask(page)

    assert page.locator(".token").count() == 2000
    assert seconds() - before < 4
    scroller = page.locator("#scroller")
    assert scroller.evaluate("it => it.scrollHeight - it.scrollTop - it.clientHeight") < 60, "it follows the answer"


# Weights.


def test_hover_shows_the_exact_weights(page: Any, server: ScriptedServer):
    server.replies = [Reply(TOKENS)]
    ask(page)
    tip = page.locator("#tip")
    assert tip.is_hidden()

    page.locator(".token").nth(0).hover()
    assert tip.get_attribute("aria-label") == "Use: code 0.83, text 0.12, math 0.05"
    assert tip.locator("li").all_inner_texts() == ["code\n0.83", "text\n0.12", "math\n0.05"]
    page.locator(".token").nth(3).hover()
    assert tip.get_attribute("aria-label") == ".: text 0.997, code 0.003, math 0.00"
    page.mouse.move(5, 5)
    assert tip.is_hidden()


def test_arrow_keys_move_from_token_to_token_and_read_the_weights(page: Any, server: ScriptedServer):
    server.replies = [Reply([*TOKENS, ("\n", WEIGHTS), ("", WEIGHTS), ("Next", WEIGHTS), (" line", WEIGHTS)])]
    ask(page)
    reading = page.locator("#reading")
    assert page.locator(".token[tabindex]").count() == 1

    page.locator(".token[tabindex]").focus()
    assert reading.text_content() == "Use: code 0.83, text 0.12, math 0.05"
    page.keyboard.press("ArrowRight")
    assert reading.text_content() == "␣a: text 0.60, code 0.30, math 0.10"
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.textContent") == " line", "the nearest in the next line"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert reading.text_content().startswith("↵: "), "a token without text is passed over"
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.textContent") == " line"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Home")
    assert page.evaluate("document.activeElement.textContent") == "Use"
    assert page.locator(".token[tabindex]").count() == 1
    assert page.locator("#tip").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_the_strip_stacks_the_weights_of_all_tokens(page: Any, server: ScriptedServer):
    server.replies = [Reply([("a", (0.5, 0.3, 0.2)), ("b", (0.1, 0.8, 0.1))])]
    ask(page)
    strip = page.locator(".strip")

    assert strip.get_attribute("aria-label") == "Gate weights over the answer; mean: code 0.55, text 0.30, math 0.15"
    assert strip.locator(".layer").evaluate_all("it => it.map((layer) => layer.getAttribute('d'))") == [
        "M0,1V0.000H1V0.000H2V1Z",
        "M0,1V0.200H1V0.100H2V1Z",
        "M0,1V0.500H1V0.900H2V1Z",
    ]
    box = strip.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 5)
    assert page.locator(".token.pointed").text_content() == "b"


def test_the_legend_shows_the_mean_weights_of_the_last_answer(page: Any, server: ScriptedServer):
    server.replies = [Reply([("a", (0.5, 0.3, 0.2)), ("b", (0.1, 0.8, 0.1))])]
    ask(page)

    assert page.locator("#switches .name").all_text_contents() == list(NAMES)
    assert page.locator("#switches .mean").all_text_contents() == ["0.30", "0.55", "0.15"]
    assert page.locator("#switches .swatch").all_text_contents() == ["t", "c", "m"], "letters beside colours"


def test_weights_that_do_not_fit_the_text_colour_nothing(page: Any, server: ScriptedServer):
    server.specialists = ("text", "code", "math", "law")  # four names, three weights
    server.replies = [Reply([("plain", (0.2, 0.3, 0.5))])]
    page.reload()
    ask(page)

    assert text_of(page) == "plain"
    assert page.locator(".token").get_attribute("class") == "token"
    assert page.locator(".strip").is_hidden()


# Switches.


def test_solo_and_leave_out_change_the_request(page: Any, server: ScriptedServer):
    ask(page)
    page.get_by_role("button", name="Leave out math").click()
    ask(page)
    page.get_by_role("button", name="Leave out text").click()
    assert page.get_by_role("button", name="Leave out code").is_disabled(), "somebody has to answer"
    ask(page)
    page.get_by_role("button", name="Solo: code answers alone").click()
    assert page.get_by_role("button", name="Solo: code answers alone").get_attribute("aria-pressed") == "true"
    ask(page)
    page.get_by_role("button", name="Solo: code answers alone").click()
    page.get_by_role("button", name="Leave out text").click()
    ask(page)

    assert [body["fusion"] for body in server.bodies] == [
        {"weights": True},
        {"weights": True, "without": ["math"]},
        {"weights": True, "without": ["text", "math"]},
        {"weights": True, "override": {"code": 1}},
        {"weights": True, "without": ["math"]},
    ]
    assert page.locator(".reply > .who").all_text_contents() == [
        "Fused",
        "Without math",
        "Without text, math",
        "code alone",
        "Without math",
    ]


def test_side_by_side_asks_each_specialist_alone(page: Any, server: ScriptedServer):
    ask(page, "one")
    ask(page, "two")
    page.locator(".turn").nth(1).get_by_role("button", name="Side by side").click()
    page.wait_for_function("() => document.querySelectorAll('.column').length === 3")
    finished(page)

    asked = server.bodies[2:]
    assert sorted(json.dumps(body["fusion"]) for body in asked) == sorted(
        json.dumps({"weights": True, "override": {name: 1}}) for name in NAMES
    )
    assert {json.dumps({**body, "fusion": None}) for body in asked} == {
        json.dumps({**server.bodies[1], "fusion": None})
    }
    assert page.locator(".column .name").all_text_contents() == list(NAMES)
    assert page.locator(".column .tokens").all_text_contents() == ["Good day"] * 3
    tops = page.locator(".column").evaluate_all("it => it.map((column) => column.getBoundingClientRect().top)")
    assert len(set(tops)) == 1, "side by side"


def test_stop_ends_all_that_answer_side_by_side(page: Any, server: ScriptedServer):
    page.get_by_label("Ask each one alone, too").check()
    server.replies = [Reply(), *[Reply(held=True)] * 3]
    send(page)
    page.wait_for_function("() => document.querySelectorAll('.column').length === 3")
    page.wait_for_timeout(100)
    page.get_by_role("button", name="Stop").click()
    server.await_gone(3)
    finished(page)

    assert page.locator(".column .note").all_text_contents() == ["stopped"] * 3


# What goes wrong.


def test_an_error_of_the_server_is_shown_in_its_own_words(page: Any, server: ScriptedServer):
    server.replies = [Reply(status=400, message="The prompt has 3000 tokens, <b>the</b> context 2048.")]
    ask(page)
    await_text(page, "#notice p", "The prompt has 3000 tokens, <b>the</b> context 2048.")
    assert page.locator("#notice").get_attribute("role") == "alert"
    page.get_by_role("button", name="Ask again").click()
    await_text(page, ".tokens", "Good day")

    assert page.locator("#notice").is_hidden()
    assert len(server.bodies[-1]["messages"]) == 1


def test_a_question_without_an_answer_is_not_part_of_the_conversation(page: Any, server: ScriptedServer):
    server.replies = [Reply(status=400, message="No.")]
    ask(page, "one")
    await_text(page, "#notice p", "No.")
    ask(page, "two")

    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "two"}]


def test_an_error_in_the_middle_keeps_what_has_come(page: Any, server: ScriptedServer):
    server.replies = [Reply(TOKENS, fails_after=2, message="The engine ended.")]
    ask(page)
    await_text(page, "#notice p", "The engine ended.")

    assert text_of(page) == "Use a"
    assert page.locator(".note").first.text_content().startswith("broken off · 2 tokens")


def test_a_full_server_is_asked_again_when_it_said(page: Any, server: ScriptedServer):
    server.replies = [Reply(status=503, message="The queue is full.", retry_after_s=1)]
    ask(page)
    await_text(page, "#notice p", "The queue is full.")
    await_text(page, "#notice button", "Ask again (1 s)")
    await_text(page, ".tokens", "Good day")

    assert len(server.bodies) == 2


def test_a_connection_that_breaks_is_made_again(page: Any, server: ScriptedServer):
    server.replies = [Reply(TOKENS, breaks_after=2)]
    ask(page)
    await_text(page, "#notice p", "Trying to reach the server")
    assert text_of(page) == "Use a"
    await_text(page, "#notice p", "The server is back.")
    page.get_by_role("button", name="Ask again").click()
    await_text(page, ".tokens", "Good day")


def test_a_server_that_goes_away_is_found_when_it_returns(visit: Opener, server: ScriptedServer):
    page = visit()
    ask(page, "one")
    server.shutdown()
    server.server_close()
    send(page, "two")
    await_text(page, "#notice p", "The server cannot be reached. Trying to reach the server")
    with scripted_server(server.server_address[1]) as returned:
        returned.specialists = ("law", "art", "food")
        await_text(page, "#notice p", "The server is back.")
        assert page.locator("#switches .name").all_text_contents() == ["law", "art", "food"]
        page.get_by_role("button", name="Ask again").click()
        await_text(page, ".turn:nth-child(2) .tokens", "Good day")
        page.goto("about:blank")  # lets go of the connection

    assert [message["content"] for message in returned.bodies[0]["messages"]] == ["one", "Good day", "two"]


def test_a_server_with_a_key_asks_for_it_and_gets_it(visit: Opener, server: ScriptedServer):
    server.key = "s3cret"
    page = visit()
    dialog = page.locator("#key-dialog")
    dialog.wait_for()
    page.get_by_role("textbox", name="API key").fill("wrong")
    page.keyboard.press("Enter")
    await_text(page, "#key-reason", "The key was not accepted: This server needs an API key")
    page.get_by_role("textbox", name="API key").fill("s3cret")
    page.keyboard.press("Enter")
    ask(page)

    assert text_of(page) == "Good day"
    assert dialog.is_hidden()
    assert page.evaluate("[...Object.values(sessionStorage), ...Object.values(localStorage)]") == ["s3cret"]
    page.reload()
    ask(page)
    assert text_of(page) == "Good day", "the tab remembers"
    page.get_by_role("button", name="curl").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert "s3cret" not in copied
    assert "$OPENAI_API_KEY" in copied


def test_a_key_that_is_refused_in_the_middle_costs_no_setting(page: Any, server: ScriptedServer):
    page.get_by_role("button", name="Solo: math").click()
    server.key = "another"
    send(page)
    page.locator("#key-dialog").wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Enter a key").click()
    page.get_by_role("textbox", name="API key").fill("not a key\u20ac")
    page.keyboard.press("Enter")
    assert page.locator("#key-dialog").is_visible(), "that can be no key"
    page.get_by_role("textbox", name="API key").fill("another")
    page.keyboard.press("Enter")
    await_text(page, ".tokens", "Good day")

    assert server.bodies[-1]["fusion"]["override"] == {"math": 1}
    assert page.get_by_role("button", name="Solo: math").get_attribute("aria-pressed") == "true"


# What a model may write.


def test_markup_in_an_answer_is_text(page: Any, server: ScriptedServer):
    attack = (
        "<img src=x onerror=alert(1)><script>alert(2)</script></div><svg/onload=alert(3)>"
        "&lt;b&gt; [x](javascript:alert(4))<img src=x onerror=alert(5)>\u202e<img src=x onerror=alert(6)>"
    )
    tokens = [(piece, WEIGHTS) for piece in re.split(r"(?<=[>;])", attack)]
    server.replies = [Reply(tokens), Reply(status=400, message=attack)]
    before = page.locator("img, script, iframe, a").count()
    ask(page, attack)
    page.locator(".token").first.hover()
    ask(page, attack)
    await_text(page, "#notice p", "<script>")
    page.wait_for_timeout(100)

    assert page.locator("img, script, iframe, a").count() == before
    assert text_of(page, ".tokens") == text_of(page, ".question") == attack.replace("\u202e", "U+202E")
    assert page.locator("#notice p").text_content() == attack


def test_what_cannot_be_seen_is_shown_as_a_sign(page: Any, server: ScriptedServer):
    text = "a\u202eb\u2066c\x1b[2Jd\x00e\u200bf\ufeffg\U000e0041h\x85i\tj\u200d"
    server.replies = [Reply([(text, WEIGHTS), ("\u202e", WEIGHTS), (" end", WEIGHTS)])]
    ask(page)

    signs = ["U+202E", "U+2066", "␛", "␀", "U+200B", "U+FEFF", "U+E0041", "U+0085", "U+202E"]
    assert page.locator(".sign").all_text_contents() == signs
    assert text_of(page) == "aU+202EbU+2066c␛[2Jd␀eU+200BfU+FEFFgU+E0041hU+0085i\tj\u200dU+202E end"
    assert page.locator(".sign").first.evaluate("it => getComputedStyle(it).unicodeBidi") == "isolate"
    assert page.locator(".tokens").evaluate("it => getComputedStyle(it).unicodeBidi") == "plaintext"
    page.locator(".token").nth(1).hover()
    assert page.locator(".tip-token").text_content() == "U+202E"
    page.get_by_role("button", name="Copy", exact=True).click()
    await_text(page, ".tools-row button", "Copied")
    assert (
        page.evaluate("navigator.clipboard.readText()").replace("\x00", "") == text.replace("\x00", "") + "\u202e end"
    )


def test_50_kb_without_a_space_stay_inside(page: Any, server: ScriptedServer):
    server.replies = [Reply([("x" * 25_000, WEIGHTS), ("\u0301" * 50 + "y" * 25_000, WEIGHTS)])]
    ask(page)

    assert len(text_of(page)) == 50_050
    assert page.locator(".tokens").evaluate("it => it.scrollWidth <= it.clientWidth + 1")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


# What is copied.


TRAPS = """It's "quoted" $HOME `date` \\ 'end' \u202e \U0001f600 <b>"""


def ask_for_copies(page: Any, server: ScriptedServer) -> dict[str, Any]:
    page.locator("[name=top_k]").fill("5")
    page.locator("[name=seed]").fill("7")
    page.locator("[name=stop]").fill("it's\\n")
    page.get_by_role("button", name="Leave out math").click()
    ask(page, TRAPS)
    return server.bodies[-1]


def copied(page: Any, button: str) -> str:
    page.get_by_role("button", name=button).click()
    await_text(page, ".tools-row button", "Copied")
    return str(page.evaluate("navigator.clipboard.readText()"))


def test_the_curl_command_sends_the_same_request(page: Any, server: ScriptedServer):
    body = ask_for_copies(page, server)
    command = copied(page, "curl")
    shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=20)

    assert command.startswith(f"curl -N '{server.address}/v1/chat/completions' \\\n")
    assert not re.search("[\u202a-\u202e]", command)
    assert server.bodies[-1] == body
    assert shown.stdout.endswith("data: [DONE]\n\n")


def test_the_python_program_sends_the_same_request(page: Any, server: ScriptedServer, tmp_path: Path):
    body = ask_for_copies(page, server)
    program = copied(page, "Python")
    assert 'extra_body={"top_k": 5, "fusion": {"weights": True, "without": ["math"]}}' in program
    assert not re.search("[\u202a-\u202e]", program)
    compile(program, "copied", "exec")
    if importlib.util.find_spec("openai") is None:
        pytest.skip("openai is not installed: the program is not run")
    (tmp_path / "copied.py").write_text(program, encoding="utf-8")
    shown = subprocess.run([sys.executable, tmp_path / "copied.py"], capture_output=True, text=True, timeout=60)

    assert shown.stdout == "Good day\n", shown.stderr
    assert server.bodies[-1] == body


# Where it is looked at.


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_is_cut_off_on_a_narrow_screen(visit: Opener, server: ScriptedServer, width: int):
    page = visit(viewport={"width": width, "height": 700}, has_touch=True, is_mobile=True)
    server.replies = [Reply([*TOKENS, ("W" * 300, WEIGHTS)])]
    ask(page, "W" * 200)
    server.replies = [Reply(status=400, message="E" * 300)]
    ask(page)
    wide = """() => [...document.querySelectorAll('body *')]
        .filter((it) => it.checkVisibility() && it.getBoundingClientRect().right > innerWidth + 1)
        .map((it) => it.outerHTML.slice(0, 80))"""

    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(wide) == []
    assert page.locator("#legend").inner_text().split()[::3] == ["t", "c", "m"]
    page.locator(".token").first.tap()
    assert page.locator("#tip").is_visible()
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Solo: math answers alone").tap()
    assert page.evaluate(wide) == []
    small = """it => it.filter((one) => one.checkVisibility() && one.getBoundingClientRect().height < 44)
        .map((one) => one.textContent)"""
    assert page.locator("button, input:not([type=checkbox]), textarea, .check").evaluate_all(small) == []
    page.get_by_role("button", name="Done").click()
    assert page.locator("#panel").is_hidden()
    ask(page)
    assert server.bodies[-1]["fusion"]["override"] == {"math": 1}


def test_light_and_dark_follow_the_system_until_one_is_chosen(visit: Opener):
    page = visit(color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(20, 22, 26)"
    page.get_by_role("button", name="Switch between light and dark").click()
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    page.reload()
    assert page.evaluate(background) == "rgb(255, 255, 255)", "the choice is remembered"


def test_everything_can_be_reached_by_keyboard_and_shows_its_focus(page: Any, server: ScriptedServer):
    ask(page)
    page.evaluate("document.activeElement.blur()")
    names = []
    for _ in range(40):
        page.keyboard.press("Tab")
        names.append(
            page.evaluate("""() => {
                const it = document.activeElement;
                const label = it.getAttribute('aria-label') || it.labels?.[0]?.textContent || it.textContent;
                const bare = it !== document.body && getComputedStyle(it).outlineStyle === 'none';
                return label.trim().slice(0, 30) + (bare ? ' (no focus to see)' : '');
            }""")
        )
    assert {
        "New chat",
        "Good",
        "Copy",
        "Side by side",
        "Your question",
        "Send",
        "Leave out code",
        "Temperature",
    } <= set(names)
    assert [name for name in names if name.endswith("(no focus to see)")] == []
    assert len(server.bodies) == 1


def test_nothing_moves_for_those_who_do_not_want_it(visit: Opener, server: ScriptedServer):
    server.replies = [Reply(held=True)]
    page = visit(reduced_motion="reduce")
    send(page)
    page.locator(".answer[aria-busy=true]").wait_for()

    assert page.evaluate("document.getAnimations().length") == 0
