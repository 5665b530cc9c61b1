"""Gates on real instructions and answers: they leave nearly all of good sets alone, and find what is planted."""

import os
from functools import cache
from pathlib import Path

import pytest

from synthesis_memory import MemoryContext, MemoryView, an_item, recipe_for
from ultrafuser.data.records import Problems, read_records
from ultrafuser.synthesis.domain import load_domain
from ultrafuser.synthesis.gates.build import build_gates
from ultrafuser.synthesis.recipe import DomainConfig

DATA = Path(os.environ.get("ULTRAFUSER_DATA", Path(__file__).parents[2] / "shared" / "data"))

pytestmark = pytest.mark.skipif(not (DATA / "eval").is_dir(), reason=f"no data in {DATA}: set ULTRAFUSER_DATA")


@cache
def turns(file: str) -> list[tuple[str, str]]:
    """Instruction and answer of the first 600 records."""
    records = read_records(DATA / file, domain="d", limit=600, on_error="skip", problems=Problems())
    texts = [[message.content for message in record.messages if message.role != "system"] for record in records]
    return [(instruction, answer) for instruction, answer, *_ in texts]


@pytest.mark.parametrize(
    ("domain", "file"),
    [
        ("text", "text/alpaca_claude_t45_5k.json"),
        ("code", "code/evol_code_gen2_2k.json.gz"),
        ("math", "math/gsm8k_train.jsonl.gz"),
    ],
)
@pytest.mark.parametrize("stage", ["instructions", "responses"])
def test_gates_leave_good_sets_alone(domain: str, file: str, stage: str):
    """Fewer than 1 in 100 of what people train on is dropped by any gate."""
    context = MemoryContext(MemoryView())
    gates = build_gates(stage, load_domain(domain, DomainConfig()), recipe_for(domain))
    dropped = {gate.name: 0 for gate in gates}
    for number, (instruction, answer) in enumerate(turns(file)):
        asked = an_item(instruction, key=f"i{number:04}", state="kept")
        context.view.put(asked)
        item = an_item(answer, key=f"r{number:04}", stage=stage, parent=asked.key) if stage == "responses" else asked
        for gate in gates:
            if gate.judge(item, context) is not None:
                dropped[gate.name] += 1
            else:
                gate.kept(item, context)

    assert all(number < 0.01 * len(turns(file)) for number in dropped.values()), dropped


def test_copies_of_test_questions_are_found_in_a_real_set():
    """The real test sets, one question of which stands among real instructions."""
    recipe = recipe_for("math", benchmarks=DATA / "eval")
    gates = build_gates("instructions", load_domain("math", DomainConfig()), recipe)
    (gate,) = (gate for gate in gates if gate.name == "overlap")
    planted = (
        "Solve this for my son: Janet’s ducks lay 16 eggs per day. She eats three for breakfast every morning and "
        "bakes muffins for her friends every day with four."
    )

    assert gate.judge(an_item(planted), MemoryContext()) == "overlaps with gsm8k"
    clean = [text for text, _ in turns("text/alpaca_claude_t45_5k.json")[:200]]
    assert [gate.judge(an_item(text), MemoryContext()) for text in clean] == [None] * 200
