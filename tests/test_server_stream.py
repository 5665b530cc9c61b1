"""The end of an answer that nobody waits for any longer, at every moment at which its client can leave."""

import asyncio

import pytest
from starlette.types import Message

from server_helpers import ASK, MODEL, FakeEngine
from ultrafuser.engine.requests import GenerationRequest, Listener, StreamEvent, TokenPiece
from ultrafuser.server.answering import Answering
from ultrafuser.server.compose_chat import ChatComposer
from ultrafuser.server.facts import RequestFacts
from ultrafuser.server.metrics import Metrics
from ultrafuser.server.protocol import ChatRequest
from ultrafuser.server.settings import Deadlines
from ultrafuser.server.stream import StreamedAnswer, WholeAnswer
from ultrafuser.server.token_text import TokenText

EVENT = StreamEvent(0, (TokenPiece(5, "a", (0.5, 0.3, 0.2), None, ()),))
GONE = {"type": "http.disconnect"}


class Engine(FakeEngine):
    """Takes one request and says nothing by itself."""

    def submit(self, request: GenerationRequest, listener: Listener) -> "Engine":
        del request
        self.listener, self.is_cancelled = listener, False
        return self

    def cancel(self) -> None:
        self.is_cancelled = True


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def leave(kind: type[StreamedAnswer | WholeAnswer], lead: int) -> tuple[bool, bool]:
    """The client leaves `lead` turns of the event loop after a token (before it, where negative).

    Returns:
        Whether the engine was told, and whether nothing waits for it any more.
    """
    engine, facts = Engine(), RequestFacts("test")
    requests = [GenerationRequest(prompts=((1,),) * len(engine.names))]
    gone: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

    async def receive() -> Message:
        return await gone

    async def send(message: Message) -> None:
        del message
        await turns(1)

    body = ChatRequest.model_validate(ASK)
    composer = ChatComposer(body, requests, model_name=MODEL, names=engine.names, tokens=TokenText(engine.tokenizer))
    answer = kind(Answering(engine, requests, Deadlines(), facts, Metrics(engine)), composer)
    working = asyncio.ensure_future(answer({"type": "http", "state": {"facts": facts}}, receive, send))
    await turns(20)
    steps = [lambda: engine.listener(EVENT), lambda: gone.set_result(GONE)]
    for step in steps if lead >= 0 else reversed(steps):
        step()
        await turns(abs(lead))
    done, _ = await asyncio.wait({working}, timeout=2.0)
    if not done:
        working.cancel()
    return engine.is_cancelled, bool(done)


@pytest.mark.parametrize("kind", [StreamedAnswer, WholeAnswer])
@pytest.mark.parametrize("lead", range(-8, 9))
def test_a_client_that_leaves_while_a_token_comes_ends_the_work(kind: type[StreamedAnswer | WholeAnswer], lead: int):
    assert asyncio.run(leave(kind, lead)) == (True, True)
