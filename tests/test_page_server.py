"""The chat page on the real server, over a tiny model: what one sees is what the model said."""

from collections.abc import Sequence

from helpers import make_fused, make_tokenizer
from page_helpers import real_browser
from server_helpers import MODEL, NAMES, make_engine, serving
from ultrafuser.chat.messages import Message
from ultrafuser.drawing.palette import heaviest
from ultrafuser.generation import SamplingParams
from ultrafuser.model.generator import FusedGenerator

NUM_TOKENS = 24
# The text of tokens but for the signs that stand for what cannot be seen.
UNSIGNED = """it => it.flatMap((token) => [...token.childNodes])
    .filter((node) => node.nodeType === Node.TEXT_NODE).map((node) => node.data).join('')"""


def test_a_conversation_on_the_real_server():
    question = "what is 2 + 2?"
    generator = FusedGenerator(make_fused(), make_tokenizer())
    asked, params = [(Message("user", question),)], SamplingParams(max_tokens=NUM_TOKENS)
    expected = generator.generate(asked, params)[0]
    with generator.alone("code"):
        alone = generator.generate(asked, params)[0]

    said: list[str] = []
    with serving(make_engine()) as served, real_browser() as browser:
        page = browser.new_page()
        page.set_default_timeout(8000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(served.url)
        page.locator("#model").filter(has_text=MODEL).wait_for()
        page.locator("[name=max_tokens]").fill(str(NUM_TOKENS))
        page.locator("#question").fill(question)
        page.locator("#question").press("Enter")
        page.get_by_role("button", name="Side by side").click()
        page.wait_for_function("count => document.querySelectorAll('.column').length === count", arg=len(NAMES))
        page.locator("#send").wait_for()

        shown = page.locator(".said > .slot .token")
        assert shown.count() == len(expected.token_ids) == NUM_TOKENS
        classes = shown.evaluate_all("it => it.map((token) => token.classList[1])")
        assert classes == [f"s{heaviest(row)}" for row in expected.gate_weights]
        assert plain(shown.evaluate_all(UNSIGNED)) == plain(expected.text) != ""
        column = page.locator(f".column:nth-child({1 + NAMES.index('code')}) .token")
        assert plain(column.evaluate_all(UNSIGNED)) == plain(alone.text) != ""
        means = [f"{mean(expected.gate_weights, n):.2f}" for n in range(len(NAMES))]
        assert page.locator("#switches .mean").all_text_contents() == means
        page.close()
    assert said == []


def plain(text: str) -> str:
    """What is no control and no part of a broken character."""
    return "".join(character for character in text if character.isascii() and character.isprintable())


def mean(rows: Sequence[Sequence[float]], column: int) -> float:
    return sum(row[column] for row in rows) / len(rows)


def test_a_browser_with_the_key_as_its_password_opens_the_page_and_asks():
    with serving(make_engine(), keys=["sk-right"]) as served, real_browser() as browser:
        context = browser.new_context(http_credentials={"username": "any", "password": "sk-right"})
        page = context.new_page()
        page.set_default_timeout(8000)
        page.goto(served.url)
        page.locator("#model").filter(has_text=MODEL).wait_for()
        page.locator("[name=max_tokens]").fill("4")
        page.locator("#question").fill("hi")
        page.locator("#question").press("Enter")
        page.wait_for_function("() => document.querySelectorAll('.said > .slot .token').length === 4")
        context.close()


def test_a_browser_with_a_wrong_password_sees_nothing():
    with serving(make_engine(), keys=["sk-right"]) as served, real_browser() as browser:
        context = browser.new_context(http_credentials={"username": "any", "password": "sk-wrong"})
        response = context.request.get(served.url)
        assert response.status == 401
        assert "UltraFuser" not in response.text()
        context.close()
