"""The data set's card: README.md with the YAML header by which `datasets.load_dataset` finds files and splits.

It says what is in the set, which models wrote it, what the gates dropped, and how it was made. No address, key or
database of the recipe stands in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ultrafuser.files import write_text_atomically
from ultrafuser.synthesis.dataset.records import SPLITS, licence_of
from ultrafuser.synthesis.dataset.summary import ExportSummary
from ultrafuser.synthesis.dataset.tally import StageTally, cell, drops_table, tally
from ultrafuser.synthesis.recipe import SynthesisRecipe
from ultrafuser.synthesis.storage.store import Store

PAPER = "[arXiv 2403.08281](https://arxiv.org/abs/2403.08281)"
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
UNTOLD = {"url", "key_variable", "extra_body", "timeout_s", "concurrency"}  # of an endpoint: nobody else's business
FIELDS = {
    "id": "key of the first answer; the same synthesis gives the same",
    "messages": "the conversation: `role` and `content`, the user first",
    "domain": "of the recipe",
    "meta_topic, sub_topic, fine_topic": "names of the topics it was made for, null where there is none",
    "relation": "how its instruction came to be: seed, strong, weak (related to examples), free, complicated, evolved",
    "lineage": "the stages it went through",
    "model, endpoint": "who wrote the answer",
    "instruction_model": "who wrote the instruction",
    "licence": "of the answer, as the recipe states it",
    "language": "of the domain",
}


def write_card(path: Path, store: Store, recipe: SynthesisRecipe, summary: ExportSummary) -> None:
    """Write the card of an export.

    Raises:
        DataError: It cannot be written.
    """
    header = yaml.safe_dump(_header(recipe, summary), sort_keys=False, allow_unicode=True)
    lines = [f"---\n{header}---", *_body(tally(store, recipe), recipe, summary)]
    write_text_atomically("\n\n".join(lines) + "\n", path)


def _header(recipe: SynthesisRecipe, summary: ExportSummary) -> dict[str, Any]:
    return {
        "pretty_name": recipe.export.name,
        "license": recipe.export.licence,
        "language": summary.languages,
        "task_categories": ["text-generation"],
        "tags": ["synthetic", "instruction-tuning", "ultrafuser"],
        "size_categories": [_size(summary.num_records)],
        "configs": _configs(summary),
    }


def _configs(summary: ExportSummary) -> list[dict[str, Any]]:
    """All domains together, then each alone; of two formats one is read, or every record would be there twice."""
    ending = ".parquet" if any(name.endswith(".parquet") for name in summary.files) else ".jsonl"
    files = [name for name in summary.files if name.endswith(ending)]
    domains = list(dict.fromkeys(domain for domain, _ in summary.splits))
    configs = [{"config_name": "default", "default": True, "data_files": _data_files(files)}]
    for domain in domains:
        own = [name for name in files if name.startswith(f"data/{domain}-")]
        configs.append({"config_name": domain, "data_files": _data_files(own)})
    return configs


def _data_files(files: Sequence[str]) -> list[dict[str, Any]]:
    by_split = {split: [name for name in files if f"-{split}." in name] for split in SPLITS}
    return [{"split": split, "path": names} for split, names in by_split.items() if names]


def _size(number: int) -> str:
    return next((name for limit, name in SIZES if number < limit), "n>1M")


def _body(tallies: list[StageTally], recipe: SynthesisRecipe, summary: ExportSummary) -> list[str]:
    parts = [
        f"# {recipe.export.name}",
        f"{summary.num_records:,} conversations written by language models, made in stages: topics, instructions, "
        f"related and more complex instructions, answers ({PAPER}, Section 3.2). Made by UltraFuser, recipe "
        f"`{recipe.name}`.",
        _code("python", ["from datasets import load_dataset", "", 'data = load_dataset("path/to/this/folder")']),
        "## Records",
        _lines(_counts_table(tallies, summary)),
        *_incomplete(summary),
        "Validation is by sub-topic: all records of a topic, and of topics of the same name, are on one side.",
    ]
    if summary.form == "messages":
        fields = [f"| {name} | {meaning} |" for name, meaning in FIELDS.items()]
        parts += ["## Fields", _lines(["| field | meaning |", "| --- | --- |", *fields])]
    else:
        parts += ["## Fields", "`id`, and `data`: the texts of a conversation in turn, the user's first."]
    parts += ["## Models of origin", _lines(_origins_table(recipe, summary))]
    parts += [
        f"The set as a whole: licence `{recipe.export.licence}`. What a model writes may be bound by its provider's "
        "terms; the recipe states these licences, nothing checks them."
    ]
    if drops := drops_table(tallies):
        parts += ["## What the gates dropped", _lines(drops)]
    parts += ["## How it was made", "The recipe, without addresses, keys and database:", _recipe(recipe)]
    return parts


def _incomplete(summary: ExportSummary) -> list[str]:
    lacking = []
    for name, wanted in summary.wanted.items():
        if (there := sum(summary.splits[name, split] for split in SPLITS)) < wanted:
            lacking.append(f"{name} {there:,} of {wanted:,}")
    return [f"Fewer than the recipe asks for: {', '.join(lacking)}."] if lacking else []


def _counts_table(tallies: list[StageTally], summary: ExportSummary) -> list[str]:
    kept = {(one.domain, one.stage): one.kept for one in tallies}
    relations = list(dict.fromkeys(relation for _, relation in sorted(summary.relations)))
    head = ["domain", "records", "train", "validation", "meta-topics", "sub-topics", *relations]
    rows = []
    for domain in dict.fromkeys(domain for domain, _ in summary.splits):
        train, validation = (summary.splits[domain, split] for split in SPLITS)
        topics = [kept.get((domain, "meta_topics"), 0), kept.get((domain, "sub_topics"), 0)]
        numbers = [train + validation, train, validation, *topics, *(summary.relations[domain, r] for r in relations)]
        rows.append(f"| {domain} | " + " | ".join(f"{number:,}" for number in numbers) + " |")
    return [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1), *rows]


def _origins_table(recipe: SynthesisRecipe, summary: ExportSummary) -> list[str]:
    lines = ["| endpoint | model | licence | instructions | answers |", "| --- | --- | --- | ---: | ---: |"]
    for endpoint, model in sorted({*summary.origins, *summary.instruction_origins}):
        counts = [f"{counter[endpoint, model]:,}" for counter in (summary.instruction_origins, summary.origins)]
        lines.append(f"| {endpoint} | {cell(model)} | {licence_of(endpoint, recipe)} | {' | '.join(counts)} |")
    return lines


def _recipe(recipe: SynthesisRecipe) -> str:
    tree = recipe.model_dump(mode="json", exclude_defaults=True)
    tree = {key: value for key, value in tree.items() if key not in ("database", "folder", "benchmarks")}
    for endpoint in tree["endpoints"].values():
        for key in UNTOLD & set(endpoint):
            del endpoint[key]
    for domain in tree["domains"].values():
        domain.pop("folder", None)
    return _code("yaml", yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).rstrip().split("\n"))


def _code(language: str, lines: Iterable[str]) -> str:
    return _lines([f"```{language}", *lines, "```"])


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines)
