"""How fast the sandbox is, beside plain `python -c` processes, on the canonical solutions of HumanEval.

Both use two workers. The ratio is what to compare between machines.

    python benchmarks/sandbox.py --json sandbox.json
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ultrafuser.provenance import describe_run
from ultrafuser.sandbox.job import humaneval_job
from ultrafuser.sandbox.sandbox import open_sandbox

DATA = Path(os.environ.get("ULTRAFUSER_DATA", Path(__file__).parents[2] / "shared" / "data"))
NUM_WORKERS = 2


def read_items() -> list[dict[str, Any]]:
    """The items of HumanEval."""
    with gzip.open(DATA / "eval" / "humaneval.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def seconds_in_processes(items: list[dict[str, Any]]) -> float:
    """One interpreter an item, nothing locked: what most harnesses do."""

    def run(item: dict[str, Any]) -> bool:
        program = f"{item['prompt']}{item['canonical_solution']}\n{item['test']}\ncheck({item['entry_point']})"
        return subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0

    start = time.perf_counter()
    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        passed = sum(pool.map(run, items))
    assert passed == len(items), f"{passed} of {len(items)} passed"
    return time.perf_counter() - start


def seconds_in_sandbox(items: list[dict[str, Any]]) -> tuple[float, float, str]:
    """Seconds to open the sandbox, seconds for the items, and the policy."""
    jobs = [
        humaneval_job(
            item["prompt"] + item["canonical_solution"],
            prompt=item["prompt"],
            test=item["test"],
            entry_point=item["entry_point"],
        )
        for item in items
    ]
    start = time.perf_counter()
    with open_sandbox(num_workers=NUM_WORKERS) as sandbox:
        opened = time.perf_counter()
        passed = sum(result.is_pass for result in sandbox.run(jobs))
        done = time.perf_counter()
    assert passed == len(items), f"{passed} of {len(items)} passed"
    return opened - start, done - opened, sandbox.policy


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    items = read_items()
    start_s, sandbox_s, policy = seconds_in_sandbox(items)
    processes_s = seconds_in_processes(items)
    numbers = {
        "run": describe_run(),
        "policy": policy,
        "num_items": len(items),
        "num_workers": NUM_WORKERS,
        "start_s": round(start_s, 3),
        "sandbox_items_per_s": round(len(items) / sandbox_s, 1),
        "process_items_per_s": round(len(items) / processes_s, 1),
        "ratio": round(processes_s / sandbox_s, 3),
    }
    print(json.dumps(numbers, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
