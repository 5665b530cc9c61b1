"""Many impatient clients for minutes: is anything lost, mixed up or leaked?

Each client asks questions whose answers are known beforehand (greedy or seeded, asked once alone), streamed or whole,
and now and then hangs up in the middle. In the end nothing may run, and memory and file handles must be as they were.

Example: python benchmarks/soak.py runs/demo/model --minutes 5 --json soak.json
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from ultrafuser.provenance import describe_run

NUM_QUESTIONS = 24
CANCELLED_SHARE = 0.3  # of requests that hang up in the middle
GROWTH_BYTES = 200 * 2**20  # of the server's memory between the first minute and the end


@dataclass
class Soak:
    """One run against a server.

    Attributes:
        url: Of the server.
        model: What it calls its model.
        max_tokens: Longest answer.
        seed: Of what clients do.
    """

    url: str
    model: str
    max_tokens: int = 24
    seed: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def run(self, *, num_clients: int, seconds: float, pid: int) -> dict[str, Any]:
        """Ask for so long; returns the findings, `ok` among them."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=num_clients)
        with httpx.Client(base_url=self.url, timeout=120, limits=limits) as client:
            self._answers = [self._whole(client, question) for question in self._questions()]
            self._crowd(client, num_clients, min(seconds / 5, 30.0))  # what is allocated once is allocated now
            before = _process(pid)
            self.counts.clear()
            begin = time.monotonic()
            self._crowd(client, num_clients, seconds)
            took = time.monotonic() - begin
        idle = self._becomes_idle()
        after = _process(pid)
        findings = {
            "clients": num_clients,
            "seconds": round(took, 1),
            **dict(sorted(self.counts.items())),
            "wrong": len(self.wrong),
            "examples": self.wrong[:5],
            "idle_at_end": idle,
            "rss_before_mib": round(before["rss"] / 2**20, 1),
            "rss_after_mib": round(after["rss"] / 2**20, 1),
            "files_before": before["files"],
            "files_after": after["files"],
        }
        grown = after["rss"] - before["rss"]
        leaked = grown > GROWTH_BYTES or after["files"] > before["files"] + 2
        done = self.counts["whole"] + self.counts["streamed"]
        return {**findings, "ok": bool(not self.wrong and idle and not leaked and done and not self.counts["lost"])}

    def _questions(self) -> list[dict[str, Any]]:
        questions: list[dict[str, Any]] = []
        for number in range(NUM_QUESTIONS):
            content = f"Question {number}: " + "tell me more " * (number % 5)
            sampling = {"temperature": 0.0} if number % 2 else {"temperature": 1.0, "seed": number}
            messages = [{"role": "user", "content": content}]
            questions.append({"model": self.model, "messages": messages, "max_tokens": self.max_tokens, **sampling})
        return questions

    def _whole(self, client: httpx.Client, question: dict[str, Any]) -> str:
        response = client.post("/v1/chat/completions", json=question)
        response.raise_for_status()
        return str(response.json()["choices"][0]["message"]["content"])

    def _crowd(self, client: httpx.Client, num_clients: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        threads = [
            threading.Thread(target=self._client, args=(client, number, end), daemon=True)
            for number in range(num_clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds + 300)
        # A client that still waits has lost its answer.
        self.counts["lost"] += sum(thread.is_alive() for thread in threads)

    def _client(self, client: httpx.Client, number: int, end: float) -> None:
        draw = random.Random(self.seed * 1000 + number)
        questions = self._questions()
        while time.monotonic() < end:
            index = draw.randrange(len(questions))
            try:
                self._ask(client, draw, index, questions[index])
            except (httpx.HTTPError, ValueError, KeyError) as error:
                self.counts["lost"] += 1
                self.wrong.append(f"question {index}: {type(error).__name__}")

    def _ask(self, client: httpx.Client, draw: random.Random, index: int, question: dict[str, Any]) -> None:
        if draw.random() < CANCELLED_SHARE:
            self._hang_up(client, draw, question)
            return
        if draw.random() < 0.5:
            self._compare(index, self._whole(client, question), "whole")
            return
        text, ended = "", False
        with client.stream("POST", "/v1/chat/completions", json=question | {"stream": True}) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line:
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or ""
        self._compare(index, text if ended else f"{text} (no end)", "streamed")

    def _hang_up(self, client: httpx.Client, draw: random.Random, question: dict[str, Any]) -> None:
        """Leave after some chunks, or without waiting for an answer."""
        if draw.random() < 0.5:
            with client.stream("POST", "/v1/chat/completions", json=question | {"stream": True}) as response:
                for _, _ in zip(range(draw.randrange(1, 8)), response.iter_lines(), strict=False):
                    pass
            self.counts["left"] += 1
            return
        try:
            client.post("/v1/chat/completions", json=question, timeout=httpx.Timeout(30, read=draw.uniform(0.001, 0.2)))
        except httpx.ReadTimeout:
            self.counts["impatient"] += 1

    def _compare(self, index: int, text: str, kind: str) -> None:
        self.counts[kind] += 1
        if text != self._answers[index]:
            self.wrong.append(f"question {index}, {kind}: {text!r} instead of {self._answers[index]!r}")

    def _becomes_idle(self) -> bool:
        for _ in range(50):
            figures = httpx.get(f"{self.url}/metrics").text
            if "requests_running 0.0" in figures and "requests_waiting 0.0" in figures:
                return True
            time.sleep(0.1)
        return False


@contextmanager
def server(model: str) -> Iterator[tuple[str, int]]:
    """A server of its own: address and process."""
    script = str(Path(sys.executable).with_name("ultrafuser"))
    command = [script, "serve", model, "--port", "0", "--name", "soak", "--max-running", "16"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the server did not start: {' '.join(command)}")
        try:
            yield line.split()[-1], process.pid
        finally:
            process.terminate()


def _process(pid: int) -> dict[str, int]:
    folder = Path(f"/proc/{pid}")
    pages = int((folder / "statm").read_text(encoding="ascii").split()[1])
    return {"rss": pages * 4096, "files": len(list((folder / "fd").iterdir()))}


def main() -> None:
    """Run and report; exit 1 when something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the findings there, too")
    options = parser.parse_args()
    with server(options.model) as (url, pid):
        soak = Soak(url, "soak", options.max_tokens, options.seed)
        findings = soak.run(num_clients=options.clients, seconds=options.minutes * 60, pid=pid)
    text = json.dumps({"run": describe_run(), **findings}, indent=1)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    raise SystemExit(0 if findings["ok"] else 1)


if __name__ == "__main__":
    main()
