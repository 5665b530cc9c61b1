"""What a pass of a few rows costs, and a drafted token: what speculation and batches live on.

    python benchmarks/passes.py runs/smollm2/stage1-gate
    python benchmarks/passes.py runs/smollm2/stage1-gate --threads 1 --cpu-time   # on a busy machine

Medians, with our own kernel for few rows (`engine/few_rows.py`) and without it: weights that are in memory once
(`pack=False`), and a second layout beside them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from decode import Bench

from ultrafuser.engine import few_rows
from ultrafuser.engine.runner import Feed

ROWS = (1, 2, 3, 4, 5, 6, 7, 9)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cpu-time", action="store_true", help="Of the one thread, which others cannot lengthen much.")
    options = parser.parse_args()
    if options.cpu_time and options.threads > 1:
        raise SystemExit("the time of one thread says nothing about several: add --threads 1")
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    clock = time.thread_time if options.cpu_time else time.perf_counter
    bench = Bench(options.model, quick=True)
    for label, has_kernel, pack in (
        ("our kernel", True, False),
        ("torch's kernels", False, False),
        ("torch's kernels and a second layout", False, True),
    ):
        if has_kernel and not few_rows.has_kernel():
            print(f"no kernel of our own: {few_rows.why_missing()}")
            continue
        print(label)
        with patch.object(few_rows, "has_kernel", lambda told=has_kernel: told):
            measure(bench, pack, clock)


@torch.inference_mode()
def measure(bench: Bench, pack: bool, clock: Callable[[], float]) -> None:
    """All numbers of one layout."""
    names = list(bench.whole.names)
    engine = bench.engine(names, drafts=("self",), pack=pack)
    runner, prompts = engine.runner, bench.rows(engine, bench.prompts["text"])[0]
    batch = min(16, engine.num_slots)
    for slot in range(batch):
        runner.hidden({view: Feed([slot], [0], [row]) for view, row in enumerate(prompts)})

    def read(num_choices: int, rows: int) -> None:
        new = [list(range(50, 50 + rows))] * num_choices
        slots = list(range(num_choices))
        hidden = runner.hidden({v: Feed(slots, [len(row)] * num_choices, new) for v, row in enumerate(prompts)})
        last = {view: states.flatten(0, 1) for view, states in hidden.items()}
        runner.fused(last, runner.weights(runner.scores(last), torch.ones((1, 1), dtype=torch.bool)))

    def draft(reduced: bool) -> None:
        hidden = runner.hidden({0: Feed([0], [len(prompts[0])], [[50]])}, reduced=reduced)[0]
        runner.logits(0, hidden[0], reduced=reduced)

    for rows in ROWS:
        print(f"  {rows} rows of one choice: {median_ms(partial(read, 1, rows), clock):6.1f} ms", flush=True)
    print(f"  one row of {batch} choices: {median_ms(partial(read, batch, 1), clock):6.1f} ms")
    for form, reduced in (("exact weights", False), (runner.draft_form, True)):
        print(f"  a token of one specialist, {form}: {median_ms(partial(draft, reduced), clock):6.1f} ms", flush=True)


def median_ms(function: Callable[[], None], clock: Callable[[], float], repetitions: int = 9) -> float:
    """Milliseconds, after two calls that are not counted."""
    times = []
    for number in range(repetitions + 2):
        began = clock()
        function()
        if number >= 2:
            times.append(clock() - began)
    return 1e3 * statistics.median(times)


if __name__ == "__main__":
    main()
