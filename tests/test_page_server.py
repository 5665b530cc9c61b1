"""The chat page on the real server, over a tiny model: what one sees is what the engine said."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from page_helpers import real_browser
from training_helpers import DOMAINS, TOKENIZER, make_fused
from ultrafuser.chat.messages import Message
from ultrafuser.engine.engine import Engine, EngineOptions
from ultrafuser.engine.thread import EngineThread
from ultrafuser.generation import SamplingParams
from ultrafuser.model.generator import FusedGenerator
from ultrafuser.server.app import create_app
from ultrafuser.server.settings import ServerSettings

NUM_TOKENS = 24
# The text of tokens but for the signs that stand for what cannot be seen.
UNSIGNED = """it => it.flatMap((token) => [...token.childNodes])
    .filter((node) => node.nodeType === Node.TEXT_NODE).map((node) => node.data).join('')"""


@contextmanager
def served() -> Iterator[str]:
    """The address of a server over an untrained fusion of two specialists."""
    engine = EngineThread(Engine(make_fused(), TOKENIZER, EngineOptions()))
    app = create_app(engine, ServerSettings(model_name="tiny"))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        engine.close()


def test_a_conversation_on_the_real_server():
    question = "what is 2 + 2?"
    generator = FusedGenerator(make_fused(), TOKENIZER)
    asked = [(Message("user", question),)]
    expected = generator.generate(asked, SamplingParams(max_tokens=NUM_TOKENS))[0]
    with generator.alone("code"):
        alone = generator.generate(asked, SamplingParams(max_tokens=NUM_TOKENS))[0]

    said: list[str] = []
    with served() as address, real_browser() as browser:
        page = browser.new_page()
        page.set_default_timeout(8000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(address)
        page.locator("#model").filter(has_text="tiny").wait_for()
        page.locator("[name=max_tokens]").fill(str(NUM_TOKENS))
        page.locator("#question").fill(question)
        page.locator("#question").press("Enter")
        page.get_by_role("button", name="Side by side").click()
        page.wait_for_function("() => document.querySelectorAll('.column .note').length === 2")
        page.locator("#send").wait_for()
        page.get_by_role("button", name="curl").click()

        shown = page.locator(".said > .slot .token")
        assert shown.count() == len(expected.token_ids) == NUM_TOKENS
        classes = shown.evaluate_all("it => it.map((token) => token.classList[1])")
        assert classes == [f"s{max(range(2), key=row.__getitem__)}" for row in expected.gate_weights]
        assert plain(shown.evaluate_all(UNSIGNED)) == plain(expected.text)
        column = page.locator(f".column:nth-child({1 + DOMAINS.index('code')}) .token")
        assert plain(column.evaluate_all(UNSIGNED)) == plain(alone.text)
        assert page.locator("#switches .mean").all_text_contents()[0] == f"{mean(expected.gate_weights, 0):.2f}"
        page.close()
    assert said == []


def plain(text: str) -> str:
    """What is no control and no part of a broken character."""
    return "".join(character for character in text if character.isascii() and character.isprintable())


def mean(rows: tuple[tuple[float, ...], ...], column: int) -> float:
    return sum(row[column] for row in rows) / len(rows)
