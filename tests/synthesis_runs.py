"""A run as a process of its own, to be killed: `python synthesis_runs.py RECIPE.json NODES`.

Its one domain has a single stage of so many requests; with 0 it is what the recipe says.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from synthesis_stores import CountingStage, make_plan
from ultrafuser.synthesis.pipeline import Pipeline, plan_domains, prepare
from ultrafuser.synthesis.recipe import SynthesisRecipe
from ultrafuser.synthesis.storage.store import Store


def main(recipe_path: Path, num_nodes: int) -> None:
    """Go on with the run."""
    recipe = SynthesisRecipe.model_validate_json(recipe_path.read_text())
    stages = [CountingStage("meta_topics", num_nodes, num_words=1)]
    plans = [make_plan(*stages)] if num_nodes else plan_domains(recipe)
    with Store.open(recipe) as store:
        prepare(store, plans)
        print("open", flush=True)
        summary = asyncio.run(Pipeline(recipe, store, plans).run())
    print(summary.text())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
