"""One address of an endpoint, through the openai client: a request goes in, an answer or a typed refusal comes out.

The key is read from the environment into the client's header and is nowhere else; what endpoints say is freed of it.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from ultrafuser.errors import ConfigError
from ultrafuser.synthesis.asking.endpoints.refusal import Help, Refusal, one_line, refusal_of_status, retry_after_s
from ultrafuser.synthesis.asking.endpoints.usage import check_usage, cost
from ultrafuser.synthesis.node import Answer, FinishReason, Request
from ultrafuser.synthesis.parsing import SCHEMAS
from ultrafuser.synthesis.recipe import EndpointConfig

if TYPE_CHECKING:
    import openai

CONNECT_TIMEOUT_S = 10.0
_OURS = frozenset({"model", "messages", "prompt", "max_tokens", "max_completion_tokens", "n", "best_of", "stream"})
_FINISH: dict[Any, FinishReason] = {"stop": "stop", "eos": "stop", "length": "length", "max_tokens": "length"}
_NO_CONNECTION = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol"})


class Client:
    """Asks one address.

    Args:
        name: Of the endpoint in the recipe, for messages.
        config: Of the endpoint.
        url: One of its addresses.

    Raises:
        ConfigError: The address is none, the key cannot be sent, or openai is not installed.
    """

    def __init__(self, name: str, config: EndpointConfig, url: str) -> None:
        self.name, self.config, self.url = name, config, _checked(name, url)
        if taken := _OURS & config.extra_body.keys():
            raise ConfigError(f"endpoint {name}: extra_body may not set {', '.join(sorted(taken))}: leave it out")
        self._key = _key(config)
        has_key = f"the key in {config.key_variable} is not accepted: set the right one"
        has_none = f"set {config.key_variable} to the endpoint's key"
        self.help = Help(f"endpoint {name} at {self.url}", has_key if self._key else has_none, config.model)
        self.openai = _open(self.url, config, self._key)
        self.headers: dict[str, Any] = {} if self._key else {"Authorization": _omit()}
        self._sends_schema = config.json_schema != "never"
        self._knows_schema = config.json_schema == "always"  # it has taken one
        self._limit_name = "max_tokens"

    def __repr__(self) -> str:
        return f"Client({self.name!r}, {self.url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.openai.close()

    async def ask(self, request: Request) -> Answer | Refusal:
        """The endpoint's answer, or why there is none."""
        start = time.monotonic()
        result = await self._ask(request, start)
        while isinstance(result, Refusal) and result.kind == "request" and not result.is_sure:
            retried = await self._ask_otherwise(request, result, start)
            if retried is None:
                return result
            result = retried
        return result

    async def _ask_otherwise(self, request: Request, refusal: Refusal, start: float) -> Answer | Refusal | None:
        """The same in the words of an endpoint that does not know some of ours; None: there is no other way.

        What was not known is remembered once the request went through without it.
        """
        is_chat = request.prompt is None
        if is_chat and self._limit_name == "max_tokens" and "max_completion_tokens" in refusal.message:
            self._limit_name = "max_completion_tokens"
            return await self._ask(request, start)
        if self._sends_schema and not self._knows_schema and request.answer is not None:
            result = await self._ask(request, start, with_schema=False)
            if isinstance(result, Answer) or "response_format" in refusal.message:
                self._sends_schema = False
            return result if isinstance(result, Answer) or result.kind != "request" else None
        return None

    async def _ask(self, request: Request, start: float, *, with_schema: bool = True) -> Answer | Refusal:
        sends_schema = with_schema and self._sends_schema and request.answer is not None
        try:
            async with asyncio.timeout(self.config.timeout_s):
                status, headers, text = await self._post(self.body(request, with_schema=sends_schema))
        except TimeoutError:
            return Refusal("timeout", f"{self.help.where} did not answer in {self.config.timeout_s:g} s", may_cost=True)
        except _NotConnectedError as error:
            return error.refusal
        answer = self.read(request, status, headers, text, seconds=time.monotonic() - start)
        self._knows_schema |= sends_schema and isinstance(answer, Answer)
        return answer

    async def _post(self, body: dict[str, Any]) -> tuple[int, Any, str]:
        """Status, headers and text, whatever they are."""
        import httpx2
        import openai

        path = "/completions" if "prompt" in body else "/chat/completions"
        try:
            # As for an endpoint that the client does not know, which takes a fifth less time: bodies are JSON already,
            # and answers are ours to check.
            response = await self.openai.post(
                path,
                cast_to=httpx2.Response,
                body=body | self.config.extra_body,
                options={"headers": self.headers} if self.headers else {},
            )
            return response.status_code, response.headers, response.text
        except openai.APIStatusError as error:
            return error.response.status_code, error.response.headers, error.response.text
        except openai.APITimeoutError as error:
            if type(error.__cause__).__name__ in _NO_CONNECTION:
                raise _NotConnectedError(self._unreachable(error)) from None
            raise TimeoutError from None
        except openai.APIConnectionError as error:
            raise _NotConnectedError(self._unreachable(error)) from None
        except UnicodeEncodeError:
            refusal = Refusal("request", f"the request to {self.help.where} is no valid Unicode", is_sure=True)
            raise _NotConnectedError(refusal) from None

    def _unreachable(self, error: Exception) -> Refusal:
        cause = error.__cause__ or error
        said = f"{self.help.where}: {type(cause).__name__}: {self.clean(str(cause)) or 'no connection'}"
        if type(cause).__name__ in _NO_CONNECTION:
            return Refusal("unreachable", f"{said} - is it running, and is the address right?")
        return Refusal("passing", f"{said} - the connection ended before the answer did", may_cost=True)

    def body(self, request: Request, *, with_schema: bool) -> dict[str, Any]:
        """What is posted, but for the recipe's `extra_body`."""
        body: dict[str, Any] = {
            "model": request.model,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "max_tokens" if request.prompt is not None else self._limit_name: request.max_tokens,
        }
        if request.prompt is not None:
            body["prompt"] = request.prompt
        else:
            body["messages"] = [message.model_dump() for message in request.messages]
        if request.stop:
            body["stop"] = list(request.stop)
        if self.config.send_seed:
            body["seed"] = request.seed
        if with_schema and request.answer is not None:
            schema = {"name": request.answer, "strict": True, "schema": SCHEMAS[request.answer]}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    def read(
        self, request: Request, status: int, headers: Any, text: str, *, seconds: float = 0.0, is_batch: bool = False
    ) -> Answer | Refusal:
        """What a response means."""
        is_ok = 200 <= status < 300
        if text.lstrip()[:1] == "<" and status < 500 and status not in (408, 429):
            said = f"{self.help.where} answers {status} with a page of HTML instead of JSON"
            return Refusal("fatal", f"{said}: is the address up to /v1?")
        try:
            payload = json.loads(text)
        except (ValueError, RecursionError):
            payload = None
        error = payload.get("error") if isinstance(payload, dict) else None
        if not is_ok:
            message, code = _error(error, payload, text)
            return refusal_of_status(status, self.clean(message), code, retry_after_s(headers), self.help)
        if error and not (isinstance(payload, dict) and payload.get("choices")):
            message, code = _error(error, payload, text)
            inner = error.get("code") if isinstance(error, dict) else None
            inner = inner if isinstance(inner, int) and 400 <= inner < 600 else 500
            return refusal_of_status(inner, self.clean(message), code, retry_after_s(headers), self.help)
        answer = self._answer(request, payload, seconds, is_batch)
        if answer is None:
            what = "JSON that cannot be read" if payload is None else "JSON without a choice"
            said = f"{self.help.where} answers {what}: {self.clean(text[:2000], 120)!r}"
            return Refusal("passing", said, may_cost=True)
        return answer

    def _answer(self, request: Request, payload: Any, seconds: float, is_batch: bool) -> Answer | None:
        try:
            choice = payload["choices"][0]
            said = choice["text"] if request.prompt is not None else choice["message"].get("content")
            said = said or (choice.get("message") or {}).get("refusal") or ""
            reason = choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            return None
        if not isinstance(said, str):
            return None
        text = _storable(said)
        finish = _FINISH.get(reason, "other") if isinstance(reason, str) else "other"
        usage = check_usage(payload.get("usage"), request, text, finish)
        price = cost(self.config, usage.prompt_tokens, usage.completion_tokens, is_batch=is_batch)
        model = payload.get("model")
        model = one_line(_storable(model), 200) if isinstance(model, str) and model else request.model
        return Answer(
            text, finish, usage.prompt_tokens, usage.completion_tokens, price, model, usage.is_estimated, seconds
        )

    def clean(self, text: str, length: int = 300) -> str:
        """What an endpoint said, for a message: one line, without the key."""
        return one_line(_storable(text.replace(self._key, "***") if self._key else text), length)


class _NotConnectedError(Exception):
    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal


def _open(url: str, config: EndpointConfig, key: str | None) -> openai.AsyncOpenAI:
    try:
        import httpx2
        import openai
    except ImportError as error:
        raise ConfigError("endpoints need openai: pip install 'ultrafuser[synthesis]'") from error
    # One more for a connection that is being closed while its successor opens.
    limits = httpx2.Limits(max_connections=config.concurrency + 1, max_keepalive_connections=config.concurrency + 1)
    timeout = httpx2.Timeout(config.timeout_s, connect=min(CONNECT_TIMEOUT_S, config.timeout_s))
    http = openai.DefaultAsyncHttpxClient(limits=limits, timeout=timeout)
    return openai.AsyncOpenAI(base_url=url, api_key=key or "none", max_retries=0, timeout=timeout, http_client=http)


def _omit() -> Any:
    import openai

    return openai.Omit()


def _checked(name: str, url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"endpoint {name}: {url!r} is no address: write http://HOST:PORT/v1")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError(
            f"endpoint {name}: the address at {parts.hostname} has a user, a query or a fragment: leave it out, "
            "and give the key by the environment variable that key_variable names"
        )
    return url.rstrip("/")


def _key(config: EndpointConfig) -> str | None:
    key = os.environ.get(config.key_variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"the key in {config.key_variable} holds characters that no key has: set it again")
    return key or None


def _error(error: Any, payload: Any, text: str) -> tuple[str, str | None]:
    """Message and code of an error, in the form of OpenAI, of FastAPI, or none."""
    if isinstance(error, dict):
        code = error.get("code") or error.get("type")
        return str(error.get("message") or error), code if isinstance(code, str) else None
    if isinstance(payload, dict):
        return str(error or payload.get("message") or payload.get("detail") or payload), None
    return text[:2000] or "(nothing)", None


def _storable(text: str) -> str:
    """Text as databases take it: valid Unicode, without NUL."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", "")
