"""The data of a recipe, prepared as training does it: counted at every step, encoded, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import track

from ultrafuser.alignment.encode import EncodedRecord, Encoder
from ultrafuser.analysis.token_view import check_alignment
from ultrafuser.chat.library import TOKENIZER_TEMPLATE
from ultrafuser.config.recipe import DataConfig, Recipe, SpecialistConfig
from ultrafuser.data.dataset import (
    Dataset,
    DomainReport,
    encode_record,
    encode_records,
    load_dataset,
    stop_token_trained,
    truncate,
)
from ultrafuser.data.records import Record
from ultrafuser.data.split import SPLITS
from ultrafuser.errors import ConfigError, DataError, ModelError
from ultrafuser.model.build import resolve_templates
from ultrafuser.model.specialist import load_tokenizer


@dataclass(slots=True)
class DomainCount:
    """What became of one domain's records, and how long the rest are.

    Attributes:
        report: Counts of reading: records, duplicates, overlaps with benchmarks, problems by kind.
        left_out: Records that are too long, and were dropped.
        cut: Records that are too long, and lost their end.
        stop_untrained: Cut records whose last response has lost its end token: they do not teach to stop.
        columns: Length of each kept training record, in columns of a batch.
        response_tokens: Trained tokens of each kept training record.
        kept: Records of each split.
        first: The first training records, as they will be shown.
    """

    report: DomainReport
    left_out: int = 0
    cut: int = 0
    stop_untrained: int = 0
    columns: list[int] = field(default_factory=list)
    response_tokens: list[int] = field(default_factory=list)
    kept: dict[str, int] = field(default_factory=dict)
    first: list[tuple[Record, EncodedRecord]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Preparation:
    """A recipe's data, ready to train on."""

    data: DataConfig
    names: tuple[str, ...]
    encoder: Encoder
    domains: Mapping[str, DomainCount]


def prepare(recipe: Recipe, *, num_shown: int = 0, dataset: Dataset | None = None) -> Preparation:
    """Read, check, split and encode a recipe's data exactly as training would.

    Args:
        recipe: With a data section.
        num_shown: Training records to keep of every domain, to be shown.
        dataset: Its data, when already loaded.

    Raises:
        ConfigError: The recipe has no data section.
        DataError: A file or record is bad (with file and line), a record is too long and the recipe wants an error,
            or nothing is left of a domain.
        ModelError: The tokenizer cannot be loaded.
    """
    if recipe.data is None:
        raise ConfigError(f"recipe {recipe.name!r} has no data section: there is nothing to prepare")
    encoder = load_encoder(recipe)
    dataset = dataset if dataset is not None else load_dataset(recipe.data)
    domains = {
        domain: _count_domain(domain, dataset, encoder, recipe.data, num_shown) for domain in recipe.data.domains
    }
    return Preparation(recipe.data, tuple(recipe.specialists), encoder, domains)


def load_encoder(recipe: Recipe) -> Encoder:
    """The shared tokenizer and every specialist's template, without any weights.

    Raises:
        ModelError: There is no tokenizer.
        TemplateError: A template cannot be found.
    """
    first, source = next(iter(recipe.specialists.items()))
    if recipe.tokenizer is None:
        shared: Any = load_tokenizer(source, name=first)
    else:
        shared = load_tokenizer(SpecialistConfig(model=recipe.tokenizer))
    own = {}
    for name, specialist in recipe.specialists.items():
        if specialist.template == TOKENIZER_TEMPLATE:
            try:
                own[name] = load_tokenizer(specialist, name=name)
            except ModelError:
                own[name] = shared  # as when the model is built
    specs = {name: specialist.template for name, specialist in recipe.specialists.items()}
    return Encoder(shared, resolve_templates(specs, list(specs), shared, own))


def _count_domain(domain: str, dataset: Dataset, encoder: Encoder, data: DataConfig, num_shown: int) -> DomainCount:
    count = DomainCount(dataset.report[domain])
    for split in SPLITS:
        kept = 0
        for record in _progress(dataset[split][domain], f"{domain}: {split}"):
            encoded = _encode(record, encoder, data, count)
            if encoded is None:
                continue
            kept += 1
            check_alignment(encoded, encoder)
            if split == "train":
                count.columns.append(encoded.num_columns)
                count.response_tokens.append(encoded.num_response_tokens)
                if len(count.first) < num_shown:
                    count.first.append((record, encoded))
        count.kept[split] = kept
    if not count.kept["train"]:
        raise DataError(
            f"domain {domain!r} has no training records left: all are over data.max_length {data.max_length}; raise it"
        )
    return count


def _encode(record: Record, encoder: Encoder, data: DataConfig, count: DomainCount) -> EncodedRecord | None:
    """Encode one record and follow the recipe's policy on length; None where it is left out."""
    encoded = encode_record(record, encoder, turns=data.turns)
    if encoded.num_columns > data.max_length:
        if data.overlength == "error":
            encode_records([record], encoder, max_length=data.max_length, overlength="error", turns=data.turns)
        shortened = truncate(encoded, data.max_length) if data.overlength == "truncate" else None
        if shortened is None:
            count.left_out += 1
            return None
        count.cut += 1
        encoded = shortened
    if not stop_token_trained(encoded, (encoder.end_id,)):
        if data.overlength != "truncate":
            raise DataError(f"{record.source}: its stop token is not trained, so a model would not learn to stop")
        count.stop_untrained += 1
    return encoded


def _progress(records: Sequence[Record], what: str) -> Iterable[Record]:
    """A bar on stderr where someone watches; it goes when done."""
    console = Console(stderr=True)
    return track(records, what, console=console, transient=True, disable=not console.is_terminal)
