"""The loop closed: the pipeline makes a data set, a fusion learns from it, and the demo's exam says what that is worth.

    python studies/closed_loop.py            # after `make demo`; resumes where it was stopped

A strong teacher is what a small machine lacks, so the teacher here is a program that knows the demo's world: it speaks
the OpenAI protocol over HTTP, writes topics and questions of the training split when asked for them, and answers them
rightly. Everything else is as with any endpoint: stages, gates, the store, export, and the recipe of `make demo` with
the exported set in the place of the demo's own records. Its specialists are the demo's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import threading
import time
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
import yaml

from ultrafuser.analysis.results import read_results
from ultrafuser.config.load import load_recipe
from ultrafuser.config.recipe import DataConfig, DomainConfig, SourceConfig, SpecialistConfig
from ultrafuser.demo.exam import make_exam, take_exam
from ultrafuser.demo.recipe import DOMAINS, TEST_ITEMS
from ultrafuser.demo.world import Item, make_items
from ultrafuser.files import write_text_atomically
from ultrafuser.model.generator import FusedGenerator
from ultrafuser.model.load import LoadOptions, load_model
from ultrafuser.synthesis.dataset.export import data_file, export
from ultrafuser.synthesis.load import load_synthesis
from ultrafuser.synthesis.pipeline import run_synthesis
from ultrafuser.synthesis.storage.store import Store
from ultrafuser.train.trainer import Trainer

POOL = 9000  # questions that the teacher knows in each domain
PORT = 8471

DOMAIN = {
    "about": "questions of the demo's world",
    "meta_topics": 4,
    "sub_topics": 40,
    "margin": 1.02,
    "complicated": 0.0,  # the teacher cannot: its questions are what its world allows
    "angles": ["none"],
    # The questions differ in a word or a number, and are shorter than the languages' detector wants.
    "gates": {
        stage: {"near_duplicates": None, "language": None, "length": None, "truncated": None}
        for stage in ("meta_topics", "sub_topics", "instructions", "strong", "weak", "responses")
    },
}
PROMPTS = {
    "meta_topics": "Topics of {{domain}}: {{count}}\nThere are: {{avoid}}\n{{format}}",
    "sub_topics": "Topics of {{domain}} within {{topic}}: {{count}}\nThere are: {{avoid}}\n{{format}}",
    "instructions": "Questions of {{domain}} on {{topic}}: {{count}}\nThere are: {{avoid}}\n{{format}}",
    "strong": "Questions of {{domain}} like {{examples}}: {{count}}\nThere are: {{avoid}}\n{{format}}",
    "weak": "Questions of {{domain}} unlike {{examples}}: {{count}}\nThere are: {{avoid}}\n{{format}}",
    "responses": "Answer.",
}


class Teacher:
    """Knows the training split of the demo's world."""

    def __init__(self) -> None:
        # Another seed than the demo's, so its records are others; the split keeps both away from the exam.
        self.items: dict[str, list[Item]] = {domain: make_items(domain, "train", POOL, seed=1) for domain in DOMAINS}
        self.answers = {item.question: item.answer for items in self.items.values() for item in items}

    def reply(self, request: Mapping[str, Any]) -> str:
        """An answer, or topics or questions in JSON; the same request has the same reply."""
        prompt = request["messages"][-1]["content"]
        if prompt in self.answers:
            return self.answers[prompt]
        asked = re.match(r"(Topics|Questions) of (\w+)\b.*?: (\d+)$", prompt, re.DOTALL | re.MULTILINE)
        assert asked is not None, prompt
        what, domain, count = asked[1], asked[2], int(asked[3])
        rng = random.Random(hashlib.sha256(json.dumps([prompt, request.get("seed")]).encode()).digest())
        if what == "Topics":
            names = [f"{domain} {rng.randrange(10**9)}" for _ in range(count)]
            return json.dumps({"topics": [{"name": n, "relevance": "of the world", "use_case": "exam"} for n in names]})
        return json.dumps({"instructions": [item.question for item in rng.sample(self.items[domain], count)]})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI: chat completions, whatever the path."""
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        request = json.loads(body)
        text = self.reply(request)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": len(body) // 4, "completion_tokens": len(text) // 4 + 1}
        usage["total_tokens"] = sum(usage.values())
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "world"}
        content = json.dumps(reply | {"choices": [choice], "usage": usage}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})


@contextmanager
def serving(teacher: Teacher) -> Any:
    """The teacher at its port."""
    server = uvicorn.Server(uvicorn.Config(teacher, port=PORT, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


def write_recipe(folder: Path, num_records: int) -> Path:
    """The synthesis recipe and the folders of its domains."""
    domains: dict[str, Any] = {}
    for name in DOMAINS:
        place = folder / "domains" / name
        place.mkdir(parents=True, exist_ok=True)
        settings = DOMAIN | {"title": name, "records": num_records}
        write_text_atomically(yaml.safe_dump(settings), place / "domain.yaml")
        for prompt, text in PROMPTS.items():
            write_text_atomically(text, place / f"{prompt}.md")
        domains[name] = {"folder": str(place.resolve())}
    recipe = {
        "name": "closed_loop",
        "folder": str((folder / "synthesis").resolve()),
        "endpoints": {"teacher": {"url": f"http://127.0.0.1:{PORT}/v1", "model": "world", "concurrency": 16}},
        "domains": domains,
        "export": {"validation_fraction": 0.05},
    }
    path = folder / "synthesis.yaml"
    write_text_atomically(yaml.safe_dump(recipe), path)
    return path


def main() -> None:
    """Make the set, train on it, examine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder of a finished demo")
    parser.add_argument("--folder", type=Path, default=Path("runs/closed_loop"))
    parser.add_argument("--records", type=int, default=6000, help="of each domain; the demo has as many")
    arguments = parser.parse_args()
    demo, folder = arguments.demo, arguments.folder

    began = time.perf_counter()
    synthesis = load_synthesis(write_recipe(folder, arguments.records))
    with serving(Teacher()):
        run_synthesis(synthesis)
    seconds = time.perf_counter() - began
    with Store.open(synthesis, read_only=True) as store:
        exported = export(store, synthesis, folder / "data", formats=("jsonl",))
    print(f"the pipeline made {exported.num_records} records in {seconds:.0f} s: {exported.folder}", flush=True)

    recipe = load_recipe(demo / "recipe.yaml")
    assert recipe.data is not None
    sources = {
        name: DomainConfig(sources=(SourceConfig(path=str(exported.folder / data_file(name, "train", "jsonl"))),))
        for name in DOMAINS
    }
    data = DataConfig.model_validate(recipe.data.model_dump() | {"domains": sources})
    specialists = {
        name: SpecialistConfig(model=str(demo / "specialists" / name), template=source.template)
        for name, source in recipe.specialists.items()
    }
    update = {"name": "closed_loop", "output": folder, "data": data, "specialists": specialists}
    target = Trainer(recipe.model_copy(update=update)).run()

    model, tokenizer = load_model(str(target), LoadOptions())
    exam = make_exam(DOMAINS, items_per_domain=TEST_ITEMS, seed=recipe.seed)
    grade = take_exam("closed loop", FusedGenerator(model, tokenizer), exam)
    own = read_results(demo / "results.json").scores
    print("domain: loss and accuracy on the exam; the demo's own fusion; its best specialist")
    table = {}
    for domain, score in grade.scores.items():
        ours, best = own["fused:stage2"][domain], min((own[f"specialist:{n}"][domain] for n in DOMAINS), key=_loss)
        table[domain] = {name: [s.loss, s.accuracy] for name, s in (("made", score), ("demo", ours), ("best", best))}
        shown = "; ".join(f"{loss:.3f} / {100 * (accuracy or 0):.1f}" for loss, accuracy in table[domain].values())
        print(f"{domain:>6}: {shown}")
    results = {"records": exported.num_records, "synthesis_s": seconds, "exam": table}
    write_text_atomically(json.dumps(results, indent=2) + "\n", folder / "closed_loop.json")


def _loss(score: Any) -> float:
    return float(score.loss)


if __name__ == "__main__":
    main()
