"""Takes the pictures of docs/chat.md, or those of a folder: `python tests/page_pictures.py [FOLDER]`.

The answers are scripted, so that the pictures show the page and not what some model happens to say.
"""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.text import Text

from page_helpers import NAMES, Reply, ScriptedServer, Token, real_browser, scripted_server
from ultrafuser.analysis.terminal import legend
from ultrafuser.chat.messages import Conversation
from ultrafuser.cli.answers import Stream, Voices
from ultrafuser.cli.talk import Talk
from ultrafuser.engine.requests import TokenPiece
from ultrafuser.generation import SamplingParams

COLUMNS = 92  # of the terminal
QUESTION = "How many primes are there below 20? Then write a function that tests for one."
# Who leads, and what it says; tokens are cut at spaces.
SPEECH = (
    ("text", "Going through the numbers below 20 "),
    ("math", "and crossing out multiples of 2, 3 and 5 leaves 2, 3, 5, 7, 11, 13, 17 and 19, so there are 8. "),
    ("text", "This function tests for one:\n\n"),
    ("code", "```python\ndef is_prime(n):\n    if n < 2:\n        return False\n"),
    ("code", "    return all(n % d for d in range(2, int(n**0.5) + 1))\n```\n\n"),
    ("text", "It stops at the square root, since "),
    ("math", "a divisor above it has a partner below."),
)
ALONE = {
    "text": "A prime is a number that only 1 and itself divide. Below 20 the best known are 2, 3, 5 and 7.",
    "code": "def primes(n):\n    return [p for p in range(2, n)\n            if all(p % d for d in range(2, p))]",
    "math": "2, 3, 5, 7, 11, 13, 17, 19. The answer is 8.",
}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with scripted_server() as server, real_browser() as browser:
        for scheme in ("light", "dark"):
            page = open_page(browser, server, scheme, 1200, 820)
            ask(page, server, QUESTION, speech())
            page.locator(".token", has_text="below.").hover()
            take(page, folder / f"chat-{scheme}.png")
            page.close()
        page = open_page(browser, server, "light", 1200, 860)
        ask(page, server, QUESTION, plain(ALONE["math"], "math"))
        server.replies = [plain(answer, name) for name, answer in ALONE.items()]
        page.get_by_role("button", name="Side by side").click()
        page.wait_for_timeout(500)
        take(page, folder / "chat-alone.png")
        page.close()
        page = open_page(browser, server, "light", 375, 740, phone=True)
        ask(page, server, QUESTION, speech())
        page.locator(".token", has_text="square").click()
        take(page, folder / "chat-phone.png")
        page.close()
        page = open_page(browser, server, "dark", 375, 740, phone=True)
        ask(page, server, QUESTION, speech())
        page.get_by_role("button", name="Settings").click()
        page.get_by_role("button", name="Leave out math").click()
        take(page, folder / "chat-phone-settings.png")
        page.close()
        page = open_page(browser, server, "dark", 1200, 700)
        server.replies = [Reply(speech().tokens, fails_after=20, message="The engine ended: out of memory.")]
        page.locator("#question").fill(QUESTION)
        page.keyboard.press("Enter")
        page.locator("#notice").wait_for()
        page.get_by_role("button", name="Solo: math").click()
        take(page, folder / "chat-error.png")
        page.close()
        page = browser.new_page(viewport={"width": 900, "height": 600}, device_scale_factor=1.5)
        page.set_content(terminal(), wait_until="load")
        take(page.locator("svg"), folder / "chat-terminal.png")


def terminal() -> str:
    """What `ultrafuser chat` shows, as SVG."""

    class Scripted:
        names = list(NAMES)

        def stream(self, conversation: Conversation, params: SamplingParams, voices: Voices) -> Stream:
            del conversation, params
            reply = speech() if voices.solo is None else plain(ALONE[voices.solo], voices.solo)
            column = 0
            for text, weights in reply.tokens:
                # A terminal wraps by itself, a picture of one does not.
                column = len(text) if "\n" in text else column + len(text)
                if column > COLUMNS - 4:
                    text, column = "\n" + text.lstrip(), len(text)
                yield TokenPiece(0, text, tuple(weights))

        def close(self) -> None:
            """Nothing is held."""

    console = Console(file=io.StringIO(), color_system="truecolor", width=COLUMNS, record=True)
    talk = Talk(Scripted(), SamplingParams(), console=console)
    console.print(legend(NAMES))
    for line in (QUESTION, "/weights", "/alone"):
        console.print(Text(f"> {line}", style="bold"))
        talk.take(line)
    return console.export_svg(title="ultrafuser chat runs/demo/model")


def speech() -> Reply:
    rng = random.Random(0)
    tokens: list[Token] = []
    for name, words in SPEECH:
        for word in split(words):
            lead = min(0.995, max(0.4, rng.gauss(0.83, 0.13)))
            rest = rng.random() * 0.8 + 0.1
            others = iter([(1 - lead) * rest, (1 - lead) * (1 - rest)])
            tokens.append((word, [lead if other == name else next(others) for other in NAMES]))
    return Reply(tokens)


def plain(text: str, name: str) -> Reply:
    return Reply([(word, [0.9 if other == name else 0.05 for other in NAMES]) for word in split(text)])


def split(text: str) -> list[str]:
    words: list[str] = []
    for character in text:
        if not words or (character in " \n(" and not words[-1].isspace()):
            words.append("")
        words[-1] += character
    return words


def open_page(browser: Any, server: ScriptedServer, scheme: str, width: int, height: int, phone: bool = False) -> Any:
    page = browser.new_page(
        color_scheme=scheme,
        viewport={"width": width, "height": height},
        device_scale_factor=2 if phone else 1.5,
        has_touch=phone,
        is_mobile=phone,
        reduced_motion="reduce",
    )
    page.goto(server.address)
    page.get_by_text("demo", exact=True).wait_for()
    return page


def ask(page: Any, server: ScriptedServer, question: str, reply: Reply) -> None:
    server.replies = [reply]
    page.locator("#question").fill(question)
    page.keyboard.press("Enter")
    page.locator("#send").wait_for()
    page.wait_for_timeout(300)


def take(page: Any, path: Path) -> None:
    """A picture of few colours, so that it is small."""
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "docs" / "images")
