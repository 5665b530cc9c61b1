"""How many texts a second each gate of a synthesis judges, and what it drops of real answers.

Bands are kept in memory here; in a run they lie in the database, and near duplicates wait for that.

Example: python benchmarks/gates.py ../shared/data/text/alpaca_claude_t45_5k.json --benchmarks ../shared/data/eval
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from ultrafuser.data.records import Problems, read_records
from ultrafuser.synthesis.domain import load_domain
from ultrafuser.synthesis.gates import base
from ultrafuser.synthesis.gates.build import build_gates
from ultrafuser.synthesis.node import Item
from ultrafuser.synthesis.recipe import DomainConfig, EndpointConfig, StageName, SynthesisRecipe


class Bands:
    """`gates.base.Bands` in memory."""

    def __init__(self) -> None:
        self._items: dict[tuple[str, int], dict[str, Item]] = defaultdict(dict)

    def candidates(self, scope: str, bands: Sequence[int]) -> list[Item]:
        """Items that share a band."""
        found = {key: item for band in bands for key, item in self._items.get((scope, band), {}).items()}
        return [found[key] for key in sorted(found)]

    def add(self, scope: str, item: Item, bands: Sequence[int]) -> None:
        """Remember an item."""
        for band in bands:
            self._items[scope, band][item.key] = item


class Context:
    """Items with a parent each and no siblings."""

    def __init__(self, parents: dict[str, Item]) -> None:
        self.bands: base.Bands = Bands()
        self._parents = parents

    def parent(self, item: Item) -> Item | None:
        """The instruction of an answer."""
        return self._parents.get(item.parent or "")

    def siblings(self, item: Item) -> list[Item]:
        """None."""
        del item
        return []

    def finish_reason(self, item: Item) -> str:
        """As if all had ended."""
        del item
        return "stop"


def measure(gate: base.Gate, items: Sequence[Item], context: Context) -> str:
    """A line: the gate, its rate, and what it drops."""
    gate.judge(items[0], context)  # loads what it needs
    reasons: Counter[str] = Counter()
    start = time.perf_counter()
    for item in items:
        reason = gate.judge(item, context)
        if reason is None:
            gate.kept(item, context)
        else:
            reasons[reason] += 1
    rate = len(items) / (time.perf_counter() - start)
    return f"{gate.name:>16} {rate:>9,.0f}/s  {dict(reasons.most_common())}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, help="a file of records, in any form that `ultrafuser prepare` reads")
    parser.add_argument("--benchmarks", type=Path, default=None, help="a folder of test sets")
    arguments = parser.parse_args()
    instructions: dict[str, Item] = {}
    answers: list[Item] = []
    for number, record in enumerate(read_records(arguments.records, domain="d", on_error="skip", problems=Problems())):
        turns = [message.content for message in record.messages if message.role != "system"]
        key = f"{number:08}"
        instructions[key] = Item(key, "n", None, "d", "instructions", 0, turns[0])
        answers.append(Item(f"a{key}", "n", key, "d", "responses", 0, turns[1]))
    recipe = SynthesisRecipe(
        name="gates",
        endpoints={"none": EndpointConfig(url="http://127.0.0.1:1/v1", model="none")},
        domains={"text": DomainConfig()},
        benchmarks=arguments.benchmarks,
    )
    domain = load_domain("text", DomainConfig())
    stages: dict[StageName, list[Item]] = {"instructions": list(instructions.values()), "responses": answers}
    for stage, items in stages.items():
        print(f"{len(items):,} {stage}", file=sys.stderr)
        for gate in build_gates(stage, domain, recipe):
            print(measure(gate, items, Context(instructions)))


if __name__ == "__main__":
    main()
