"""How many records a second are compared with the test sets, on one core.

python benchmarks/decontaminate.py --json decontaminate.json
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from ultrafuser.data.benchmarks import load_benchmarks
from ultrafuser.data.overlap import OverlapIndex, find_overlaps
from ultrafuser.data.records import read_records
from ultrafuser.provenance import describe_run

DATA = Path(os.environ.get("ULTRAFUSER_DATA", Path(__file__).parents[2] / "shared" / "data"))
FILES = ("math/gsm8k_train.jsonl.gz", "code/evol_code_gen2_2k.json.gz", "text/dolly_3k.json.gz")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    start = time.perf_counter()
    index = OverlapIndex(load_benchmarks(DATA / "eval", answers=True))
    indexed = time.perf_counter()
    records = [record for file in FILES for record in read_records(str(DATA / file), domain="any")]
    read = time.perf_counter()
    report = find_overlaps(records, index)
    done = time.perf_counter()
    numbers = {
        "run": describe_run(),
        "num_records": len(records),
        "num_overlaps": len(report.overlaps),
        "index_s": round(indexed - start, 3),
        "compared_records_per_s": round(len(records) / (done - read)),
        "read_and_compared_records_per_s": round(len(records) / (done - indexed)),
    }
    print(json.dumps(numbers, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
