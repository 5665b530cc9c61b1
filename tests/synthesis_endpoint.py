"""A scripted OpenAI-compatible endpoint over real HTTP: it answers from the request alone, and misbehaves on command.

As a process: `python tests/synthesis_endpoint.py --port 0 --set latency_s=0.05`; prints its address, up to /v1.
As a thread of a test: `with serving(retry_after=1) as endpoint:`; `endpoint.script` may be changed while it runs.

The same request has the same answer, which fits the JSON schema it asks for, or the JSON example in its prompt, or is
plain English. Faults are drawn by a hash of the request and how often it was seen, so that they, too, are the same in
every run and a repeated request can succeed. Beside the API there are `GET /calls` (what was asked, how often) and
`POST /script` (fields to change).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import email.utils
import hashlib
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml


def _words(text: str) -> list[str]:
    return text.split()


NOUNS = _words("""river garden engine letter market bridge teacher doctor forest mirror planet recipe violin harbour
castle pocket window shadow farmer camera library mountain signal kitchen battery student compass theatre island pencil
engineer blanket journey museum village lantern customer orchard painter railway sailor tunnel vaccine weather winter
anchor basket candle diamond elevator fountain glacier hammer iceberg jacket kettle ladder magnet needle ocean parcel
quarry ribbon saddle telescope umbrella valley wallet yacht zebra algorithm budget climate database equation function
grammar harvest invoice justice kingdom language method network opinion pattern question rhythm syllabus
theorem""")
VERBS = _words("""carries measures explains builds repairs questions paints collects follows improves describes protects
compares translates surrounds discovers organises remembers challenges supports predicts divides arranges delivers
examines reflects gathers restores simplifies transforms""")
ADJECTIVES = _words("""quiet ancient bright careful distant eager fragile gentle hollow icy jolly kind lively modern
narrow orange patient quick rapid silent tender useful vivid wooden yellow anxious bitter clever delicate empty famous
golden honest important joyful large magnetic nervous ordinary popular remarkable serious thirsty unusual wonderful""")
LINKS = _words("""because while although before after whenever unless until since whereas""")


@dataclass
class Script:
    """How the endpoint behaves; fractions are of requests.

    `faults` maps a kind to a fraction: 429, 500, 502, 503, 529 and any other status as a number; malformed (broken
    JSON), truncated (the connection ends early), html, reset (closed without a word), hang (no answer), error (200 with
    an error inside), no_choices, null (no content), empty, length (cut, finish_reason length), refusal, overlong (400:
    the prompt is too long), usage_missing, usage_negative, usage_absurd, usage_text, usage_nan, usage_low.
    """

    model: str = "scripted"
    latency_s: float = 0.0
    latency_per_request_s: float = 0.0  # for every request under way: a server that queues silently
    faults: dict[str, float] = field(default_factory=dict)
    retry_after: str | None = None  # seconds as text, or "date:SECONDS" for an HTTP date; of 429, 503 and 529
    max_at_once: int | None = None  # more under way are answered 429
    requests_per_s: float | None = None  # more are answered 429
    key: str | None = None  # another one, or none, is answered 401
    schema: bool = True  # False: response_format is answered 400
    old_max_tokens: bool = True  # False: max_tokens is answered 400, as reasoning models of OpenAI do
    seeds: bool = True  # False: the seed is not looked at
    down: bool = False  # connections are closed at once
    html: bool = False  # everything is answered with a page
    batch: bool = False  # files and batches are offered
    batch_s: float = 0.0  # how long a batch takes
    words: int = 40  # of a plain answer, at most
    list_length: int = 5  # of a JSON list, where neither schema nor prompt tells
    seed: int = 0  # of faults and answers

    def change(self, values: dict[str, Any]) -> None:
        """Set fields by name; the name must be one."""
        names = {f.name for f in dataclasses.fields(self)}
        for name, value in values.items():
            if name not in names:
                raise KeyError(f"no field {name!r} of a script; known: {', '.join(sorted(names))}")
            setattr(self, name, value)


# ---------------------------------------------------------------------------------------------- answers


def answer_text(body: dict[str, Any], script: Script) -> str:
    """What the model says to a request."""
    rng = random.Random(int(content_of(body, script), 16))
    messages = body.get("messages") or [{"role": "user", "content": body.get("prompt", "")}]
    prompt = str(messages[-1]["content"])
    schema = ((body.get("response_format") or {}).get("json_schema") or {}).get("schema")
    if schema is not None:
        return json.dumps(_value(schema, schema, rng, _wanted(prompt, script), "value"))
    example = None if "prompt" in body else _example(prompt)
    if example is not None:
        return json.dumps(_like(example, rng, _wanted(prompt, script), "value"))
    return _prose(rng, max(1, script.words))


def content_of(body: dict[str, Any], script: Script) -> str:
    """A hash of what is asked, by which calls are counted and answers drawn."""
    fields = ["model", "messages", "prompt", "temperature", "top_p", *(["seed"] if script.seeds else [])]
    text = json.dumps([[body.get(name) for name in fields], script.seed])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _wanted(prompt: str, script: Script) -> int:
    """How many entries a prompt asks for: the first number from 1 to 100 that stands alone in it."""
    numbers = (int(n) for n in re.findall(r"(?<![\w.,-])(\d{1,3})(?![\w.,-]*\d)", prompt))
    return next((n for n in numbers if 1 <= n <= 100), script.list_length)


def _example(prompt: str) -> Any:
    """The first JSON value behind the last mention of JSON in a prompt, as an example; None: there is none."""
    start = prompt.lower().rfind("json")
    if start < 0:
        return None
    prompt, decoder = re.sub(r",\s*\.\.\.(?=\s*[\]}])", "", prompt[start:]), json.JSONDecoder()
    for match in re.finditer(r"[\[{]", prompt):
        with contextlib.suppress(ValueError):
            value = decoder.raw_decode(prompt, match.start())[0]
            if value:
                return value
    return ["text"]


def _like(example: Any, rng: random.Random, count: int, name: str) -> Any:
    if isinstance(example, dict):
        return {key: _like(value, rng, count, key) for key, value in example.items()}
    if isinstance(example, list):
        return [_like(example[0] if example else "text", rng, count, name) for _ in range(count)]
    return _string(name, rng) if isinstance(example, str) else example


def _value(schema: dict[str, Any], root: dict[str, Any], rng: random.Random, count: int, name: str) -> Any:
    """A value that fits a JSON schema, of the small part of JSON Schema that answers use."""
    if "$ref" in schema:
        named = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
        return _value(named, root, rng, count, name)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if "anyOf" in schema:
        return _value(schema["anyOf"][0], root, rng, count, name)
    kind = schema.get("type", "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        return {key: _value(part, root, rng, count, key) for key, part in schema.get("properties", {}).items()}
    if kind == "array":
        number = min(max(count, schema.get("minItems", 0)), schema.get("maxItems", 10**6))
        return [_value(schema.get("items", {}), root, rng, count, name) for _ in range(number)]
    if kind in ("integer", "number"):
        return rng.randint(int(schema.get("minimum", 0)), int(schema.get("maximum", 100)))
    if kind == "boolean":
        return rng.random() < 0.5
    return None if kind == "null" else _string(name, rng)


def _string(name: str, rng: random.Random) -> str:
    if name in ("name", "topic", "topics", "title"):
        return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.choice(NOUNS)}".title()
    return _prose(rng, 24)


def _prose(rng: random.Random, num_words: int) -> str:
    """English sentences, at most so many words, each drawn on its own so that two texts share few word pairs."""
    sentences, words = [], 0
    while words < num_words:
        clauses = [_clause(rng) for _ in range(rng.randint(1, 2))]
        sentence = f" {rng.choice(LINKS)} ".join(clauses)
        words += len(sentence.split())
        sentences.append(sentence[0].upper() + sentence[1:] + ".")
    return " ".join(" ".join(sentences).split()[: max(num_words, 1)]).rstrip(".") + "."


def _clause(rng: random.Random) -> str:
    subject = f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    return f"{subject} {rng.choice(VERBS)} every {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


# ---------------------------------------------------------------------------------------------- the API


class Reply(Exception):  # noqa: N818 - a way out of nested calls, not an error of ours
    """What is sent instead of an answer."""

    def __init__(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self.status, self.body, self.headers = status, body, headers or {}


def problem(status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> Reply:
    """An error in OpenAI's form."""
    return Reply(status, {"error": {"message": message, "type": "invalid_request_error", "code": code}}, headers)


@dataclass
class Calls:
    """What was asked. A call counts when its request has come, whatever becomes of it."""

    by_content: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)  # those answered with 200 and no fault
    statuses: Counter[str] = field(default_factory=Counter)  # also of faults, by their name
    now: int = 0
    most_at_once: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)  # the last thousand
    headers: dict[str, str] = field(default_factory=dict)  # of the last request

    @property
    def total(self) -> int:
        """How many requests came."""
        return sum(self.by_content.values())

    @property
    def repeated(self) -> int:
        """How many of the answers had been given before."""
        return sum(self.answered.values()) - len(self.answered)

    def summary(self) -> dict[str, Any]:
        """As `GET /calls` gives it."""
        return {
            "total": self.total,
            "distinct": len(self.by_content),
            "answered": sum(self.answered.values()),
            "distinct_answered": len(self.answered),
            "repeated": self.repeated,
            "most_at_once": self.most_at_once,
            "statuses": dict(self.statuses),
        }


class Api:
    """The endpoint without its transport: a request in, a status and a body out."""

    def __init__(self, script: Script) -> None:
        self.script, self.calls = script, Calls()
        self._second: tuple[int, int] = (0, 0)
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}

    async def handle(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Reply:
        """The reply; its body is bytes, or a value to be sent as JSON."""
        try:
            return await self._route(method, path.partition("?")[0], headers, body)
        except Reply as reply:
            return reply

    async def _route(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Reply:
        if (method, path) == ("GET", "/calls"):
            return Reply(200, self.calls.summary())
        if (method, path) == ("GET", "/contents"):
            return Reply(200, dict(self.calls.answered))
        if (method, path) == ("POST", "/script"):
            self.script.change(json.loads(body))
            return Reply(200, {})
        self.calls.headers = headers
        if self.script.html:
            return Reply(200, b"<!DOCTYPE html><html><body>Welcome</body></html>", {"Content-Type": "text/html"})
        if self.script.key is not None and headers.get("authorization") != f"Bearer {self.script.key}":
            raise problem(401, "Incorrect API key provided", "invalid_api_key")
        if path in ("/v1/chat/completions", "/v1/completions") and method == "POST":
            return await self._complete(path, json.loads(body))
        if self.script.batch and path.startswith(("/v1/files", "/v1/batches")):
            return self._batch(method, path, headers, body)
        raise problem(404, f"no such page: {path}")

    async def _complete(self, path: str, body: dict[str, Any]) -> Reply:
        content, calls, script = content_of(body, self.script), self.calls, self.script
        calls.by_content[content] += 1
        calls.bodies.append(body)
        del calls.bodies[:-1000]
        calls.now += 1
        calls.most_at_once = max(calls.most_at_once, calls.now)
        try:
            self._refuse_load()
            if wait := script.latency_s + script.latency_per_request_s * calls.now:
                await asyncio.sleep(wait)
            fault = self._fault(content)
            if fault is not None:
                calls.statuses[fault] += 1
                if fault == "hang":
                    await asyncio.sleep(3600)
            reply = self.completion(path, body, fault)
            if fault is None or fault.startswith("usage"):
                calls.answered[content] += 1
            return reply
        finally:
            calls.now -= 1

    def _refuse_load(self) -> None:
        script, second = self.script, int(time.monotonic())
        self._second = (second, self._second[1] + 1 if self._second[0] == second else 1)
        too_fast = script.requests_per_s is not None and self._second[1] > script.requests_per_s
        if too_fast or (script.max_at_once is not None and self.calls.now > script.max_at_once):
            self.calls.statuses["429"] += 1
            raise problem(429, "Rate limit reached", "rate_limit_exceeded", self._retry_after())

    def _fault(self, content: str) -> str | None:
        number = self.calls.by_content[content]
        draw = random.Random(f"{content}:{number}:{self.script.seed}").random()
        for fault, fraction in self.script.faults.items():
            if draw < fraction:
                return str(fault)
            draw -= fraction
        return None

    def _retry_after(self) -> dict[str, str]:
        value = self.script.retry_after
        if value is None:
            return {}
        if value.startswith("date:"):
            value = email.utils.formatdate(time.time() + float(value[5:]), usegmt=True)
        return {"Retry-After": value}

    def completion(self, path: str, body: dict[str, Any], fault: str | None = None) -> Reply:
        """The answer to one request, or what a fault makes of it."""
        script = self.script
        if body["model"] != script.model:
            raise problem(404, f"The model `{body['model']}` does not exist", "model_not_found")
        if "response_format" in body and not script.schema:
            raise problem(400, "'response_format' of type 'json_schema' is not supported with this model.")
        if "max_tokens" in body and not script.old_max_tokens:
            message = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
            raise problem(400, message, "unsupported_parameter")
        if fault is not None and fault.isdigit():
            headers = self._retry_after() if fault in ("429", "503", "529") else None
            raise problem(int(fault), f"scripted {fault}", None, headers)
        if fault == "overlong":
            message = "This model's maximum context length is 4096 tokens, however you requested 5000 tokens."
            raise problem(400, message, "context_length_exceeded")
        if fault == "error":
            return Reply(200, {"error": {"message": "the upstream provider failed", "code": 502}})
        if fault == "html":
            return Reply(200, b"<html><body>Bad gateway</body></html>", {"Content-Type": "text/html"})
        reply = self._choice(path, body, fault)
        if fault == "malformed":
            return Reply(200, json.dumps(reply).encode()[:-20] + b"}}}}")
        return Reply(200, reply, {"X-Fault": fault} if fault in ("truncated", "reset") else None)

    def _choice(self, path: str, body: dict[str, Any], fault: str | None) -> dict[str, Any]:
        text, reason = answer_text(body, self.script), "stop"
        limit = int(body.get("max_tokens") or body.get("max_completion_tokens") or 10**6)
        if fault == "length" or count_tokens(text) > limit:
            pieces = re.findall(r"\S+\s*", text)
            text, reason = "".join(pieces[: min(limit, len(pieces) // 2)]), "length"
        if fault in ("empty", "refusal"):
            text = "" if fault == "empty" else "I'm sorry, but I cannot help with that."
        prompt = json.dumps(body.get("messages") or body.get("prompt"))
        used = {"prompt_tokens": count_tokens(prompt), "completion_tokens": count_tokens(text)}
        message: dict[str, Any] = {"role": "assistant", "content": None if fault == "null" else text}
        chat = path.endswith("/chat/completions")
        choice = {"message": message} if chat else {"text": text}
        reply = {
            "id": "cmpl-0",
            "object": "chat.completion" if chat else "text_completion",
            "created": 0,
            "model": self.script.model,
            "choices": [] if fault == "no_choices" else [{"index": 0, "finish_reason": reason, **choice}],
            "usage": {**used, "total_tokens": sum(used.values())},
        }
        if fault == "usage_missing":
            del reply["usage"]
        elif fault is not None and fault.startswith("usage"):
            lies: dict[str, Any] = {"negative": -5, "absurd": 10**12, "text": "many", "nan": float("nan"), "low": 0}
            reply["usage"] = dict.fromkeys(["prompt_tokens", "completion_tokens"], lies[fault.removeprefix("usage_")])
        return reply

    # ------------------------------------------------------------------------------------------ batches

    def _batch(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Reply:
        parts = path.removeprefix("/v1/").split("/")
        if method == "POST" and parts == ["files"]:
            return Reply(200, self._file(_uploaded(headers, body), "batch"))
        if method == "GET" and parts[0] == "files" and parts[-1] == "content" and parts[1] in self.files:
            return Reply(200, self.files[parts[1]])
        if method == "POST" and parts == ["batches"]:
            return Reply(200, self._start_batch(json.loads(body)))
        if method == "GET" and parts == ["batches"]:
            return Reply(200, {"object": "list", "data": list(self.batches.values()), "has_more": False})
        if method == "GET" and len(parts) == 2 and parts[1] in self.batches:
            return Reply(200, self._finish_batch(self.batches[parts[1]]))
        raise problem(404, f"no such page: {path}")

    def _file(self, data: bytes, purpose: str) -> dict[str, Any]:
        name = f"file-{len(self.files)}"
        self.files[name] = data
        fields = {"object": "file", "bytes": len(data), "created_at": 0, "filename": name, "status": "processed"}
        return {"id": name, "purpose": purpose, **fields}

    def _start_batch(self, body: dict[str, Any]) -> dict[str, Any]:
        name = f"batch-{len(self.batches)}"
        self.batches[name] = {
            "id": name,
            "object": "batch",
            "endpoint": body["endpoint"],
            "input_file_id": body["input_file_id"],
            "completion_window": body["completion_window"],
            "status": "in_progress",
            "created_at": int(time.time()),
            "metadata": {**(body.get("metadata") or {}), "_due": str(time.time() + self.script.batch_s)},
        }
        return self.batches[name]

    def _finish_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        if batch["status"] != "in_progress" or time.time() < float(batch["metadata"]["_due"]):
            return batch
        done, failed = [], []
        for line in self.files[batch["input_file_id"]].splitlines():
            entry = json.loads(line)
            content = content_of(entry["body"], self.script)
            self.calls.by_content[content] += 1
            fault = self._fault(content)
            try:
                reply = self.completion(entry["url"], entry["body"], fault)
                self.calls.answered[content] += 1
            except Reply as refused:
                reply = refused
            response = {"status_code": reply.status, "request_id": "r", "body": reply.body}
            out = done if reply.status == 200 else failed
            out.append(json.dumps({"id": "l", "custom_id": entry["custom_id"], "response": response, "error": None}))
        done.reverse()  # a batch's results come in any order
        batch["status"] = "completed"
        batch["output_file_id"] = self._file("\n".join(done).encode(), "batch_output")["id"] if done else None
        batch["error_file_id"] = self._file("\n".join(failed).encode(), "batch_output")["id"] if failed else None
        counts = {"total": len(done) + len(failed), "completed": len(done), "failed": len(failed)}
        batch["request_counts"] = counts
        return batch


def count_tokens(text: str) -> int:
    """This endpoint's tokens: four characters."""
    return max(1, -(-len(text) // 4))


def _uploaded(headers: dict[str, str], body: bytes) -> bytes:
    """The file of a multipart form."""
    boundary = headers["content-type"].partition("boundary=")[2].strip('"').encode()
    for part in body.split(b"--" + boundary):
        head, _, data = part.partition(b"\r\n\r\n")
        if b'name="file"' in head:
            return data.removesuffix(b"\r\n")
    raise problem(400, "no file in the form")


# ---------------------------------------------------------------------------------------------- HTTP


class Connection(asyncio.Protocol):
    """HTTP/1.1, as little of it as the client speaks: one request at a time, bodies with a length or in chunks."""

    def __init__(self, api: Api) -> None:
        self.api, self.buffer, self.task = api, bytearray(), None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        if self.api.script.down:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.task is None:
            self._next()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - named by asyncio
        if self.task is not None:
            self.task.cancel()

    def _next(self) -> None:
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        first, *lines = bytes(self.buffer[:end]).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        taken = self._body(end + 4, headers)
        if taken is None:
            return
        body, length = taken
        del self.buffer[:length]
        method, path, _ = first.split(" ", 2)
        self.task = asyncio.get_running_loop().create_task(self._reply(method, path, headers, body))

    def _body(self, start: int, headers: dict[str, str]) -> tuple[bytes, int] | None:
        """The body, and where in the buffer it ends; None: it is not all there."""
        if headers.get("transfer-encoding", "").lower() != "chunked":
            end = start + int(headers.get("content-length", 0))
            return (bytes(self.buffer[start:end]), end) if len(self.buffer) >= end else None
        body = b""
        while (line_end := self.buffer.find(b"\r\n", start)) >= 0:
            size = int(self.buffer[start:line_end], 16)
            start = line_end + 2
            if len(self.buffer) < start + size + 2:
                return None
            body += self.buffer[start : start + size]
            start += size + 2
            if size == 0:
                return body, start
        return None

    async def _reply(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        if self.api.script.down:
            self.transport.abort()
            return
        reply = await self.api.handle(method, path, headers, body)
        fault = reply.headers.pop("X-Fault", None)
        if fault == "reset":
            self.transport.abort()
            return
        data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        fields = {"Content-Type": "application/json", **reply.headers, "Content-Length": str(len(data))}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        data = data[: len(data) // 2] if fault == "truncated" else data
        self.transport.write(f"HTTP/1.1 {reply.status} X\r\n{head}\r\n".encode() + data)
        self.task = None
        if fault == "truncated":
            self.transport.close()
        else:
            self._next()


async def start(api: Api, port: int = 0) -> asyncio.Server:
    """Listen on this machine."""
    return await asyncio.get_running_loop().create_server(lambda: Connection(api), "127.0.0.1", port, backlog=1024)


@dataclass
class Endpoint:
    """One that runs in a thread of this process."""

    url: str
    api: Api

    @property
    def script(self) -> Script:
        """How it behaves, to be changed at will."""
        return self.api.script

    @property
    def calls(self) -> Calls:
        """What it was asked."""
        return self.api.calls


@contextlib.contextmanager
def serving(port: int = 0, **script: Any) -> Iterator[Endpoint]:
    """An endpoint in a thread, for as long as the block lasts."""
    api, loop = Api(Script(**script)), asyncio.new_event_loop()
    server = loop.run_until_complete(start(api, port))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield Endpoint(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", api)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


@contextlib.contextmanager
def serving_process(port: int = 0, **script: Any) -> Iterator[str]:
    """An endpoint as a process of its own; gives its address. `GET {address without /v1}/calls` tells what it saw."""
    settings = [f"--set={name}={json.dumps(value)}" for name, value in script.items()]
    command = [sys.executable, __file__, "--port", str(port), *settings]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


async def _main(port: int, script: Script) -> None:
    server = await start(Api(script), port)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description="A scripted OpenAI-compatible endpoint.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the script")
    options = parser.parse_args()
    script = Script()
    script.change({name: yaml.safe_load(value) for name, _, value in (s.partition("=") for s in options.set)})
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main(options.port, script))


if __name__ == "__main__":
    main()
