"""Where the answers of a chat come from: an engine in this process, or a server of ours or another's.

Both give an answer token by token. Whoever stops reading closes the iterator, which ends the work.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from queue import SimpleQueue
from typing import Any, Protocol
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from ultrafuser.chat.messages import Conversation
from ultrafuser.engine.requests import GenerationRequest, StreamEvent, TokenPiece
from ultrafuser.errors import ModelError
from ultrafuser.generation import SamplingParams

Stream = Generator[TokenPiece, None, None]

KEY_VARIABLE = "OPENAI_API_KEY"
TIMEOUT_S = 120.0  # without a token


@dataclass(frozen=True, slots=True)
class Voices:
    """Who takes part: one alone, or all but some."""

    solo: str | None = None
    without: tuple[str, ...] = ()

    def __str__(self) -> str:
        """As a prompt shows it; nothing where all take part."""
        if self.solo is not None:
            return f"{self.solo} alone"
        return f"without {', '.join(self.without)}" if self.without else ""


class Answers(Protocol):
    """Gives answers; `names` are the specialists, in the order of the weights."""

    names: list[str]

    def stream(self, conversation: Conversation, params: SamplingParams, voices: Voices) -> Stream:
        """The tokens of an answer as they come. Raises an UltrafuserError when there is none."""
        ...

    def close(self) -> None:
        """End what answers."""
        ...


def open_answers(place: str) -> Answers:
    """A server at `http://HOST:PORT`, else a model that is loaded here. Raises ConfigError, ModelError."""
    return ServerAnswers(place) if place.startswith(("http://", "https://")) else EngineAnswers(place)


class EngineAnswers:
    """A model loaded into this process.

    Args:
        place: Folder or hub id.
    """

    def __init__(self, place: str) -> None:
        # torch takes seconds to load: a chat with a server need not wait for it.
        from ultrafuser.engine.load import load_engine
        from ultrafuser.engine.thread import EngineThread

        self._engine = EngineThread(load_engine(place))
        self.names = self._engine.names

    def stream(self, conversation: Conversation, params: SamplingParams, voices: Voices) -> Stream:
        """The tokens of an answer as they come."""
        request = GenerationRequest(
            self._engine.encode_conversation(conversation),
            params,
            without=voices.without,
            weights=None if voices.solo is None else {voices.solo: 1.0},
        )
        events: SimpleQueue[StreamEvent] = SimpleQueue()
        handle = self._engine.submit(request, events.put)
        try:
            while True:
                event = events.get()
                yield from event.pieces
                if event.finish_reason == "error":
                    raise ModelError(event.error)
                if event.finish_reason is not None:
                    return
        finally:
            handle.cancel()

    def close(self) -> None:
        """End the engine's thread."""
        self._engine.close()


class ServerAnswers:
    """A running server; one that is not ours gives answers without weights.

    Args:
        address: With or without `/v1`. Its key is in the environment, as OpenAI's clients have it.
    """

    def __init__(self, address: str) -> None:
        self._url = address.rstrip("/").removesuffix("/v1") + "/v1"
        with closing(self._open("models")) as response:
            cards = _read_json(self._url, response.read()).get("data") or []
        if not cards:
            raise ModelError(f"{self._url} has no model")
        self._model = cards[0]["id"]
        self._is_ours = "fusion" in cards[0]
        self.names: list[str] = cards[0]["fusion"]["specialists"] if self._is_ours else [self._model]

    def stream(self, conversation: Conversation, params: SamplingParams, voices: Voices) -> Stream:
        """The tokens of an answer as they come; of a server that is not ours, pieces without weights."""
        body = self._request(conversation, params, voices)
        with closing(self._open("chat/completions", body)) as response:
            for data in self._events(response):
                if data == "[DONE]":
                    return
                yield from self._pieces(_read_json(self._url, data))
        raise ModelError(f"{self._url} broke off in the middle of the answer")

    def close(self) -> None:
        """Nothing is held between answers."""

    def _request(self, conversation: Conversation, params: SamplingParams, voices: Voices) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [message.to_dict() for message in conversation],
            "temperature": params.temperature,
            "top_p": params.top_p,
            "max_tokens": params.max_tokens,
            "stream": True,
        }
        chosen = {"top_k": params.top_k, "min_p": params.min_p, "seed": params.seed, "stop": list(params.stop)}
        body |= {name: value for name, value in chosen.items() if value}
        if params.seed is not None:
            body["seed"] = params.seed
        if self._is_ours:
            override = None if voices.solo is None else {voices.solo: 1.0}
            fusion = {"weights": True, "override": override, "without": list(voices.without)}
            body["fusion"] = {name: value for name, value in fusion.items() if value}
        return body

    def _open(self, path: str, body: Mapping[str, Any] | None = None) -> HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            response: HTTPResponse = urlopen(Request(f"{self._url}/{path}", data, headers), timeout=TIMEOUT_S)
        except HTTPError as error:
            hint = f" (the key is read from {KEY_VARIABLE})" if error.code == 401 else ""
            raise ModelError(f"{self._url} refuses: {_message(error)}{hint}") from error
        except (URLError, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ModelError(f"{self._url} cannot be reached: {reason}: is it up?") from error
        return response

    def _events(self, response: HTTPResponse) -> Iterator[str]:
        try:
            for line in response:
                if line.startswith(b"data:"):
                    yield line[5:].decode("utf-8").strip()
        except (OSError, HTTPException) as error:
            raise ModelError(f"{self._url} broke off in the middle of the answer: {error}") from error

    def _pieces(self, chunk: Mapping[str, Any]) -> Iterator[TokenPiece]:
        if error := chunk.get("error"):
            raise ModelError(f"{self._url} failed: {error.get('message')}")
        for choice in chunk.get("choices") or []:
            content = (choice.get("delta") or {}).get("content") or ""
            tokens = choice.get("fusion") or []
            if "".join(token["text"] for token in tokens) == content:
                yield from (TokenPiece(t["token_id"], t["text"], tuple(t["weights"])) for t in tokens)
            else:
                yield TokenPiece(-1, content)


def _read_json(url: str, text: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ModelError(f"{url} answers with something that is no JSON: is it an OpenAI-compatible server?") from error
    return value if isinstance(value, dict) else {}


def _message(error: HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, LookupError, TypeError, OSError):
        return f"status {error.code}"
