"""The data set in numbers: the paper's table, what gates dropped, how varied it is; Markdown, JSON and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ultrafuser.drawing.figures import can_draw
from ultrafuser.errors import DataError
from ultrafuser.files import write_text_atomically
from ultrafuser.synthesis.dataset.charts import draw_lengths, draw_map, draw_topics
from ultrafuser.synthesis.dataset.diversity import WORDS, Diversity, Embed, Place, Sample, can_compare, find_diversity
from ultrafuser.synthesis.dataset.measure import CountLengths, DomainNumbers, count_words, measure_domain
from ultrafuser.synthesis.dataset.records import SynthesisRecord, read_synthesis
from ultrafuser.synthesis.dataset.tally import StageTally, cell, drops_table, tally
from ultrafuser.synthesis.domain import load_domain
from ultrafuser.synthesis.recipe import SynthesisRecipe
from ultrafuser.synthesis.storage.store import Store

INSTALL = "pip install 'ultrafuser[plots]'"


class StageNumbers(BaseModel):
    """What became of the items of a stage; `dropped` is by gate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    domain: str
    stage: str
    kept: int
    replaced: int
    dropped: dict[str, int]


class Stats(BaseModel):
    """All numbers; `unit` is what lengths are counted in, `missing` says what could not be made and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    synthesis: str
    unit: str
    domains: tuple[DomainNumbers, ...]
    stages: tuple[StageNumbers, ...]
    diversity: Diversity | None
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StatsOptions:
    """How to count.

    Attributes:
        count: Lengths of texts.
        unit: What they are counted in.
        embed: Makes vectors of instructions; None: by their words.
        by: Who embeds.
        sample: Instructions of each domain that are compared; the paper's figure has 5,000.
    """

    count: CountLengths = count_words
    unit: str = "words"
    embed: Embed | None = None
    by: str = WORDS
    sample: int = 1000


def write_stats(store: Store, recipe: SynthesisRecipe, folder: Path, options: StatsOptions = StatsOptions()) -> str:
    """Count, draw, and write `stats.md`, `stats.json` and pictures into a folder; gives the Markdown.

    Raises:
        DataError: There is no record yet, or a file cannot be written.
    """
    domains: list[DomainNumbers] = []
    texts: dict[str, list[str]] = {}
    for name, config in recipe.domains.items():
        sample = Sample(options.sample)
        language = load_domain(name, config).settings.language
        records = _sampled(read_synthesis(store, name, language=language), sample.add)
        if (numbers := measure_domain(name, records, options.count)) is not None:
            domains.append(numbers)
            texts[name] = sample.texts()
    if not domains:
        raise DataError(f"synthesis {recipe.name} has no answer that was kept yet: nothing to count")
    diversity, places, missing = _compare(texts, options, recipe.seed)
    tallies = tally(store, recipe)
    stats = Stats(
        synthesis=recipe.name,
        unit=options.unit,
        domains=tuple(domains),
        stages=tuple(_numbers(one) for one in tallies),
        diversity=diversity,
        missing=tuple(missing),
    )
    pictures = _draw(stats, places, folder)
    text = to_markdown(stats, drops_table(tallies), pictures)
    write_text_atomically(stats.model_dump_json(indent=1) + "\n", folder / "stats.json")
    write_text_atomically(text, folder / "stats.md")
    return text


def to_markdown(stats: Stats, drops: list[str], pictures: list[str]) -> str:
    """The numbers as a page."""
    parts = [f"# {stats.synthesis} in numbers", "\n".join(_main_table(stats)), "\n".join(_lengths_table(stats))]
    parts += ["## Stages", "\n".join(_stage_table(stats))]
    if drops:
        parts += ["## What the gates dropped", "\n".join(drops)]
    if stats.diversity is not None:
        parts += ["## Diversity", *_diversity(stats.diversity)]
    parts += [f"![{Path(name).stem}]({name})" for name in pictures]
    parts += list(stats.missing)
    return "\n\n".join(parts) + "\n"


def _sampled(records: Iterator[SynthesisRecord], offer: Callable[[str, str], None]) -> Iterator[SynthesisRecord]:
    for record in records:
        offer(record.id, record.messages[0].content)
        yield record


def _compare(
    texts: dict[str, list[str]], options: StatsOptions, seed: int
) -> tuple[Diversity | None, list[Place], list[str]]:
    if not can_compare():
        return None, [], [f"Diversity and map need scikit-learn: {INSTALL}"]
    return *find_diversity(texts, embed=options.embed, by=options.by, seed=seed), []


def _draw(stats: Stats, places: list[Place], folder: Path) -> list[str]:
    if not can_draw():
        return []
    draw_lengths(stats.domains, stats.unit, folder / "lengths.png")
    draw_topics(stats.domains, folder / "topics.png")
    if not places or stats.diversity is None:
        return ["lengths.png", "topics.png"]
    draw_map(places, stats.diversity.by, stats.diversity.silhouette, folder / "map.png")
    return ["lengths.png", "topics.png", "map.png"]


def _numbers(one: StageTally) -> StageNumbers:
    return StageNumbers(domain=one.domain, stage=one.stage, kept=one.kept, replaced=one.replaced, dropped=one.by_gate)


def _main_table(stats: Stats) -> list[str]:
    """The paper's: records, topics, length of a conversation."""
    kept = {(one.domain, one.stage): one.kept for one in stats.stages}
    rows = [
        [
            one.domain,
            f"{one.records:,}",
            f"{kept.get((one.domain, 'meta_topics'), 0):,} / {kept.get((one.domain, 'sub_topics'), 0):,}",
            f"{one.conversation.mean:,.0f}",
            f"{one.turns:.2f}",
            ", ".join(f"{name} {number:,}" for name, number in one.relations.items()),
            " / ".join(f"{number:,}" for number in one.records_per_sub_topic),
        ]
        for one in stats.domains
    ]
    head = ["domain", "records", "meta-topics / sub-topics", f"{stats.unit} per conversation", "questions"]
    return _table([*head, "instructions", "records of a sub-topic: least / median / most"], rows)


def _lengths_table(stats: Stats) -> list[str]:
    rows = []
    for one in stats.domains:
        for name, lengths in (("instruction", one.instruction), ("response", one.response)):
            numbers = (lengths.mean, lengths.low, lengths.median, lengths.high, lengths.longest)
            rows.append([one.domain, name, *(f"{number:,.0f}" for number in numbers)])
    return _table(["domain", f"length in {stats.unit}", "mean", "5%", "median", "95%", "longest"], rows)


def _stage_table(stats: Stats) -> list[str]:
    rows = [
        [one.domain, one.stage, f"{one.kept:,}", f"{one.replaced:,}", f"{sum(one.dropped.values()):,}"]
        for one in stats.stages
    ]
    return _table(["domain", "stage", "kept", "replaced", "dropped"], rows)


def _diversity(diversity: Diversity) -> list[str]:
    rows = [
        [
            one.domain,
            f"{one.instructions:,}",
            f"{one.mean_distance:.3f}",
            f"{one.median_distance:.3f}",
            f"{one.near:.1%}",
        ]
        for one in diversity.domains
    ]
    head = ["domain", "instructions", "mean distance", "median distance", "nearer than 0.1"]
    score = "" if diversity.silhouette is None else f" Silhouette of the domains: {diversity.silhouette:.3f}."
    words = f"Cosine distance of each instruction to the nearest other of a sample, by {diversity.by}.{score}"
    return [words, "\n".join(_table(head, rows))]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    return [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1), *lines]
