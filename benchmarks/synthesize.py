"""How fast a synthesis asks, and how much memory it takes for how many requests.

Speed: the whole engine (plan, claim, ask over HTTP, read, write, judge) against the scripted endpoint of the tests,
which is a process of its own. Memory: for each size a process of its own, which makes the answers, too, so that
a million come in minutes; half of the requests are planned from the items of the other half, all of which pass a gate
that compares them with all others.

Example: python benchmarks/synthesize.py --json synthesize.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultrafuser.files import write_text_atomically
from ultrafuser.provenance import describe_run
from ultrafuser.synthesis.asking.endpoints.client import Client
from ultrafuser.synthesis.course import DomainPlan
from ultrafuser.synthesis.gates.base import Gate, GateContext
from ultrafuser.synthesis.node import Answer, ChatMessage, Item, Node, Request, content_key
from ultrafuser.synthesis.pipeline import Pipeline, prepare
from ultrafuser.synthesis.recipe import GateName, StageName, SynthesisRecipe
from ultrafuser.synthesis.stages.base import ItemDraft, Stage, View
from ultrafuser.synthesis.storage.store import Store

ENDPOINT = Path(__file__).parents[1] / "tests" / "synthesis_endpoint.py"
PADDING = " ".join(["Explain it step by step, with an example."] * 20)  # a prompt of usual length
ANSWER = " ".join(["A sentence that stands for what a model would say."] * 30)


@dataclass(frozen=True)
class PlainStage:
    """Asks so many requests, or one about each item of the stage `of`; each answer is one item."""

    name: StageName
    num_nodes: int
    of: StageName | None = None
    max_rounds: int = 1

    def plan(self, view: View, round: int) -> Iterator[Node]:
        """The requests."""
        parents = (item.key for item in view.items(self.of)) if self.of else (None for _ in range(self.num_nodes))
        for slot, parent in enumerate(parents):
            message = ChatMessage(role="user", content=f"Task {slot} about {parent}. {PADDING}")
            request = Request(endpoint="one", model="scripted", messages=(message,), max_tokens=400)
            yield Node("bench", self.name, round, parent, slot, request)

    def read(self, node: Node, answer: Answer) -> list[ItemDraft]:
        """The answer as it is, made distinct."""
        return [ItemDraft(f"{node.key} {answer.text}")]

    def replaced(self, item: Item) -> str | None:  # noqa: ARG002 - as stages are called
        """None takes the place of another."""
        return None


class DistinctGate:
    """Drops an item whose text was there before."""

    name: GateName = "duplicates"

    def judge(self, item: Item, context: GateContext) -> str | None:
        """Whether it was."""
        return "seen before" if context.bands.candidates("all", [self._hash(item)]) else None

    def kept(self, item: Item, context: GateContext) -> None:
        """Remember it."""
        context.bands.add("all", item, [self._hash(item)])

    def _hash(self, item: Item) -> int:
        return int(content_key(item.text)[:16], 16)


def run(folder: Path, url: str, stages: Sequence[Stage], *, concurrency: int) -> tuple[float, int]:
    """Make a set; gives the seconds it took and how many answers came."""
    endpoint = {"url": url, "model": "scripted", "concurrency": concurrency}
    tree = {"name": "bench", "folder": str(folder), "endpoints": {"one": endpoint}, "domains": {"bench": {}}}
    recipe = SynthesisRecipe.model_validate(tree)
    gates: dict[StageName, Sequence[Gate]] = {stage.name: [DistinctGate()] for stage in stages}
    plans = [DomainPlan("bench", stages, gates, {})]
    with Store.open(recipe) as store:
        prepare(store, plans)
        summary = asyncio.run(Pipeline(recipe, store, plans).run())
    return summary.seconds, summary.num_answers


@contextmanager
def endpoint_process(latency_s: float) -> Iterator[str]:
    """The scripted endpoint; gives its address."""
    command = [sys.executable, str(ENDPOINT), "--port", "0", "--set", f"latency_s={latency_s}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def measure_speed(num_nodes: int, concurrency: int) -> dict[str, Any]:
    """Requests a second over HTTP."""
    with endpoint_process(latency_s=0.1) as url, tempfile.TemporaryDirectory() as folder:
        processor_s = time.process_time()
        seconds, num_answers = run(Path(folder), url, [PlainStage("meta_topics", num_nodes)], concurrency=concurrency)
        processor_s = time.process_time() - processor_s
    return {
        "nodes": num_nodes,
        "concurrency": concurrency,
        "seconds": round(seconds, 2),
        "requests_per_s": round(num_answers / seconds, 1),
        "processor_ms_per_request": round(processor_s / num_answers * 1000, 2),
    }


def measure_memory(num_nodes: int) -> dict[str, Any]:
    """Memory of this process for so many requests, answered here; call it once in a process."""

    async def ask(_client: Client, request: Request) -> Answer:
        await asyncio.sleep(0)
        return Answer(ANSWER, "stop", len(request.messages[0].content) // 4, len(ANSWER) // 4, 0.0, "scripted")

    Client.ask = ask  # type: ignore[method-assign,assignment]
    stages: list[Stage] = [PlainStage("meta_topics", num_nodes // 2), PlainStage("sub_topics", 0, of="meta_topics")]
    samples: list[int] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.25):
            samples.append(resident_bytes())

    with tempfile.TemporaryDirectory() as folder:
        threading.Thread(target=sample, daemon=True).start()
        seconds, num_answers = run(Path(folder), "http://127.0.0.1:9/v1", stages, concurrency=64)
        done.set()
        database_bytes = sum(path.stat().st_size for path in Path(folder).iterdir())
        recipe_tree = {"endpoints": {"one": {"url": "x", "model": "x"}}, "domains": {"bench": {}}}
        recipe = SynthesisRecipe.model_validate({"name": "bench", "folder": folder, **recipe_tree})
        with Store.open(recipe, read_only=True) as store:
            began = time.monotonic()
            counts = store.progress()
            count_s = time.monotonic() - began
    assert sum(count.nodes.get("answered", 0) for count in counts) == num_answers == num_nodes // 2 * 2
    return {
        "nodes": num_answers,
        "seconds": round(seconds, 1),
        "requests_per_s": round(num_answers / seconds),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "median_mib": round(sorted(samples)[len(samples) // 2] / 2**20, 1) if samples else None,
        "database_mib": round(database_bytes / 2**20, 1),
        "counting_s": round(count_s, 3),
    }


def resident_bytes() -> int:
    """What this process has in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Speed and memory of a synthesis.")
    parser.add_argument("--nodes", type=int, default=5000, help="requests over HTTP")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--sizes", default="1000,10000,100000,1000000", help="requests whose memory is measured")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--one-size", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_size:
        print(json.dumps(measure_memory(options.one_size)))
        return
    result: dict[str, Any] = {"run": describe_run(), "speed": measure_speed(options.nodes, options.concurrency)}
    result["memory"] = []
    print(json.dumps(result["speed"]), flush=True)
    for size in [int(size) for size in options.sizes.split(",") if size]:
        command = [sys.executable, __file__, "--one-size", str(size)]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        print(output.strip(), flush=True)
        result["memory"].append(json.loads(output))
    if options.json is not None:
        write_text_atomically(json.dumps(result, indent=2) + "\n", options.json)


if __name__ == "__main__":
    main()
