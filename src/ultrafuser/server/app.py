"""The application: routes over the engine, with the guard and the observer around them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ultrafuser import __version__
from ultrafuser.engine.requests import GenerationRequest
from ultrafuser.engine.thread import EngineThread
from ultrafuser.server import replies
from ultrafuser.server.answering import Answering
from ultrafuser.server.api_error import ApiError, from_validation
from ultrafuser.server.body import StrictRoute
from ultrafuser.server.compose import Composer
from ultrafuser.server.compose_chat import ChatComposer
from ultrafuser.server.compose_text import TextComposer
from ultrafuser.server.facts import facts_of
from ultrafuser.server.guard import Guard
from ultrafuser.server.keys import KeyRing
from ultrafuser.server.metrics import Metrics
from ultrafuser.server.observer import Observer
from ultrafuser.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from ultrafuser.server.settings import ServerSettings
from ultrafuser.server.static import INDEX, Page
from ultrafuser.server.stream import NoAnswer, StreamedAnswer, WholeAnswer
from ultrafuser.server.token_text import TokenText
from ultrafuser.server.translate import Translator

_NUM_ENCODERS = 2  # threads for templates and tokenizer; one long prompt does not stop the next
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": replies.ErrorReply} for status in (400, 401, 404, 408, 413, 414, 415, 429, 431, 500, 503, 504)
}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "With `stream`, chunks and `[DONE]`."}
}


def create_app(engine: EngineThread, settings: ServerSettings, keys: KeyRing | None = None) -> FastAPI:
    """The server as an ASGI application.

    Args:
        engine: Started; closed by whoever started it.
        settings: How to behave.
        keys: Who may use it; None: everybody.
    """
    keys, metrics = keys if keys is not None else KeyRing(), Metrics(engine)
    executor = ThreadPoolExecutor(_NUM_ENCODERS, thread_name_prefix="encode")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        yield
        executor.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="UltraFuser",
        version=__version__,
        docs_url=None,  # its scripts come from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        responses=ERRORS,
        redirect_slashes=False,
    )
    app.router.route_class = StrictRoute
    app.state.settings, app.state.draining = settings, False
    app.add_middleware(Guard, settings=settings, keys=keys, metrics=metrics)
    app.add_middleware(Observer, metrics=metrics)  # added last, so it is the outermost
    _add_errors(app)
    _add_answers(app, engine, settings, metrics, Translator(engine, settings, executor))
    _add_facts(app, engine, settings, metrics)
    _add_page(app)
    return app


def _add_answers(
    app: FastAPI, engine: EngineThread, settings: ServerSettings, metrics: Metrics, translator: Translator
) -> None:
    tokens = TokenText(engine.tokenizer)
    about: dict[str, Any] = {"model_name": settings.model_name, "names": engine.names, "tokens": tokens}

    def submit(request: Request, requests: list[GenerationRequest]) -> Answering:
        if app.state.draining:
            raise ApiError(503, "the server is shutting down", code="overloaded", headers={"Retry-After": "5"})
        try:
            return Answering(engine, requests, settings.deadlines, facts_of(request.scope), metrics)
        except ApiError as error:
            if error.status_code == 503:
                metrics.rejected("queue")
            raise

    def answer(body: ChatRequest | CompletionRequest, answering: Answering, composer: Composer) -> Response:
        return StreamedAnswer(answering, composer) if body.stream else WholeAnswer(answering, composer)

    @app.post("/v1/chat/completions", response_model=replies.ChatCompletion, responses=_STREAM)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, every specialist in its own template."""
        requests = await translator.chat(body)
        if await request.is_disconnected():
            return NoAnswer()
        return answer(body, submit(request, requests), ChatComposer(body, requests, **about))

    @app.post("/v1/completions", response_model=replies.TextCompletion, responses=_STREAM)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Go on with a text that no template has written."""
        requests = await translator.completion(body)
        if await request.is_disconnected():
            return NoAnswer()
        prompts = [prompt if isinstance(prompt, str) else engine.decode(prompt) for prompt in body.prompts]
        return answer(body, submit(request, requests), TextComposer(body, requests, prompts=prompts, **about))

    @app.post("/tokenize", response_model=replies.Tokens)
    async def tokenize(body: TokenizeRequest) -> Response:
        """What a text or a conversation is to the specialists."""
        translator.check_model(body.model)
        most = engine.max_context
        if body.messages is not None:
            rows = await translator.encode_messages(body.messages)
            by_name = {name: list(row) for name, row in zip(engine.names, rows, strict=True)}
            found = replies.Tokens(count=max(map(len, rows)), max_model_len=most, specialists=by_name)
        else:
            ids = list((await translator.encode_text(body.prompt))[0]) if body.prompt else []
            found = replies.Tokens(count=len(ids), max_model_len=most, tokens=ids)
        return JSONResponse(replies.as_json(found))

    @app.post("/detokenize", response_model=replies.Detokenized)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids, special tokens left out."""
        translator.check_model(body.model)
        translator.check_ids(body.tokens, "tokens")
        return JSONResponse({"prompt": await asyncio.to_thread(engine.decode, body.tokens)})


def _add_facts(app: FastAPI, engine: EngineThread, settings: ServerSettings, metrics: Metrics) -> None:
    card = replies.ModelCard(
        id=settings.model_name,
        created=int(time.time()),
        fusion=replies.FusionCard(specialists=list(engine.names), max_context=engine.max_context),
    )

    @app.get("/v1/models", response_model=replies.ModelList)
    async def models() -> Response:
        """The one model, its specialists and its context."""
        return JSONResponse(replies.as_json(replies.ModelList(data=[card])))

    @app.get("/health", response_model=replies.Health)
    async def health() -> Response:
        """Whether the engine lives; 503 when it has stopped, or the server is stopping."""
        if engine.failure is not None:
            raise ApiError(503, "the engine has stopped: the server must be started again", code="engine_dead")
        if app.state.draining:
            raise ApiError(503, "the server is shutting down", code="draining")
        return JSONResponse({"status": "ok"})

    @app.get("/version", response_model=replies.Version)
    async def version() -> Response:
        """Of UltraFuser."""
        return JSONResponse({"version": __version__})

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def figures() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI) -> None:
    page = Page()

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return page.serve(INDEX)

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        return page.serve(name)


def _add_errors(app: FastAPI) -> None:
    """Whatever goes wrong is told in one shape."""

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        del request
        if not isinstance(error, ApiError):  # of FastAPI itself: no such route, no such method
            message = {404: "there is nothing at this address", 405: "this address does not take this method"}
            codes = {404: "not_found", 405: "method_not_allowed"}
            text, code = message.get(error.status_code, "bad request"), codes.get(error.status_code)
            error = ApiError(error.status_code, text, code=code, headers=error.headers)
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        del request
        return from_validation(error.errors()).response()

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        del error  # the observer logs it
        return ApiError(500, f"internal error (request {facts_of(request.scope).request_id})").response()
