"""Annotations, and what alpaca-eval 0.6.6 makes of them: the reference of our length-controlled win rate.

    pip install alpaca-eval==0.6.6 && python tests/alpaca_eval_glm.py      # in an environment of its own

prints the numbers anew. alpaca-eval would download the difficulty of its own instructions, which its minimal
regression does not use: it gets zeros.
"""

from __future__ import annotations

import math
import random
import tempfile
from pathlib import Path
from typing import Any, NamedTuple


class Case(NamedTuple):
    """How annotations are made, and what came out, in percent.

    Attributes:
        merit: The model's part in the judge's preference, in log-odds.
        length: The part of the difference in length.
        longer: Characters by which the model's answers are longer on average.
        smooth: Preferences are probabilities, not verdicts.
        minimal: alpaca-eval's `length_controlled_minimal`, whose L1 penalty is chosen by cross-validation.
        unpenalised: The same regression with a penalty of nearly nothing (C = 1e6).
    """

    merit: float
    length: float
    longer: int
    num_items: int = 805
    smooth: bool = False
    minimal: float = 0.0
    unpenalised: float = 0.0


CASES = {
    "length pays": Case(0.3, 1.5, 300, minimal=57.496, unpenalised=57.4962),
    "shorter and worse": Case(-0.8, 1.2, -400, minimal=36.5945, unpenalised=36.5949),
    "far worse": Case(-2.2, 0.5, -100, minimal=19.1585, unpenalised=19.1537),
    "no effect of length": Case(0.4, 0.0, 50, minimal=57.9256, unpenalised=57.9256),
    "probabilities": Case(0.5, 0.9, 200, smooth=True, minimal=62.2777, unpenalised=62.2778),
    "few items": Case(0.6, 1.0, 200, num_items=60, minimal=50.0, unpenalised=53.0039),
}


def annotations(case: Case) -> tuple[list[int], list[float]]:
    """Differences in length (model minus reference, in characters) and preferences (1: the model), the same always."""
    draw = random.Random(0).random  # the same in every version of Python
    rows = [(draw(), draw(), draw()) for _ in range(case.num_items)]
    deltas = [case.longer + round(1200 * one) - 600 for one, _, _ in rows]
    odds = [case.merit + case.length * math.tanh(delta / 350) for delta in deltas]
    chances = [1 / (1 + math.exp(-value)) for value in odds]
    if case.smooth:
        return deltas, chances
    wins = [float(two < chance) for (_, two, _), chance in zip(rows, chances, strict=True)]
    return deltas, [0.5 if three < 0.2 else win for (_, _, three), win in zip(rows, wins, strict=True)]


def reference(case: Case, **kwargs: Any) -> float:
    """What alpaca-eval's own code makes of a case, in percent."""
    import pandas as pd
    from alpaca_eval.metrics import glm_winrate

    deltas, wins = annotations(case)
    longest = 10_000
    frame = pd.DataFrame(
        {
            "index": range(len(deltas)),
            "output_1": ["a" * longest] * len(deltas),
            "output_2": ["a" * (longest + delta) for delta in deltas],
            "generator_1": "reference",
            "generator_2": "model",
            "annotator": "judge",
            "preference": [1 + win for win in wins],
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "df_gamed.csv"
        rows = {"model": "none", "index": range(len(deltas)), "instruction_difficulty": 0.0}
        pd.DataFrame(rows).to_csv(path, index=False)
        glm_winrate.hf_hub_download = lambda **_: str(path)
        metrics = glm_winrate.get_length_controlled_winrate(
            frame,
            glm_name="length_controlled_minimal",
            save_weights_dir=None,
            glm_info=glm_winrate.GLM_INFO["length_controlled_minimal"] | ({"kwargs": kwargs} if kwargs else {}),
        )
    return float(metrics["length_controlled_winrate"])


if __name__ == "__main__":
    for name, case in CASES.items():
        print(f"{name}: minimal={reference(case):.4f}, unpenalised={reference(case, n_splits=0, C=1e6):.4f}")
