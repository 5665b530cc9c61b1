"""What the data of a recipe comes to in tokens: the batches of every phase, encoded as training encodes them.

Of each domain a stated number of records is encoded, and of each phase a stated number of steps is drawn: every one
where there are few, else evenly spread ones. What a step takes on average, and its largest piece, come from these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ultrafuser.alignment.encode import EncodedRecord, EncodedTurn, Encoder
from ultrafuser.config.recipe import DataConfig, Recipe, SpecialistConfig
from ultrafuser.config.training import StageConfig
from ultrafuser.data.compose import compose
from ultrafuser.data.dataset import encode_records, load_dataset, truncate
from ultrafuser.data.records import Record
from ultrafuser.data.sampler import Draw, Sampler
from ultrafuser.errors import ConfigError, DataError, ModelError
from ultrafuser.model.build import resolve_templates
from ultrafuser.model.specialist import load_tokenizer
from ultrafuser.train.estimate.activations import Piece, measure_piece
from ultrafuser.train.loop import COMPOSED
from ultrafuser.train.parallel.deal import deal

MOST_RECORDS = 400  # of a domain that are encoded
MOST_STEPS = 48  # of a phase that are drawn


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """One phase: what it trains and the batches that were drawn of it.

    Attributes:
        name: `tune-<specialist>`, `stage1`, `stage2`.
        stage: Its settings.
        specialists: Names of those that run.
        batches: Records of the drawn steps.
        num_records: Training records of its domains in all.
        columns: Of the records of a step, without padding, on average.
        responses: Response tokens of a step, on average.
    """

    name: str
    stage: StageConfig
    specialists: tuple[str, ...]
    batches: tuple[tuple[EncodedRecord, ...], ...]
    num_records: int
    columns: float
    responses: float
    _pieces: dict[tuple[int, int], tuple[tuple[Piece, ...], ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def pieces(self, *, parts: int, max_columns: int) -> tuple[tuple[Piece, ...], ...]:
        """What one of so many devices runs, step by step: the last one, which is dealt the longest records.

        Found once for each pair of arguments, since most settings that are tried change neither.
        """
        key = (parts, max_columns)
        if key not in self._pieces:
            distinct = {tuple(map(id, batch)): batch for batch in self.batches}  # assumed records are the same ones
            found = {
                ids: tuple(
                    measure_piece(share.records)
                    for share in deal(batch, parts=parts, part=parts - 1, max_columns=max_columns)
                )
                for ids, batch in distinct.items()
            }
            self._pieces[key] = tuple(found[tuple(map(id, batch))] for batch in self.batches)
        return self._pieces[key]


@dataclass(frozen=True, slots=True)
class Phases:
    """All phases, and in words what was counted."""

    phases: tuple[PhasePlan, ...]
    counted: str


def plan_phases(recipe: Recipe, *, tokens: tuple[int, int] | None = None) -> Phases:
    """The phases that a recipe runs, with batches.

    Args:
        recipe: With data, unless `tokens` are given.
        tokens: Prompt and response tokens that every record is taken to have; no data is then read.

    Raises:
        ConfigError: No data section, or templates that do not fit.
        DataError: Data that cannot be read.
        ModelError: No tokenizer.
    """
    if recipe.data is None:
        raise ConfigError(f"recipe {recipe.name!r} has no data section, so there is nothing to train on")
    source = _Assumed(recipe.data, tokens) if tokens is not None else _Encoded(recipe, recipe.data)
    phases = []
    everybody = tuple(recipe.specialists)
    for name, part in recipe.specialists.items():
        if part.tune is not None:
            phases.append(_plan(recipe, f"tune-{name}", part.tune, (name,), part.tune.domains, source))
    for name, stage in (("stage1", recipe.stage1), ("stage2", recipe.stage2)):
        if stage is not None and (len(everybody) > 1 or stage.train_specialists):
            phases.append(_plan(recipe, name, stage, everybody, tuple(recipe.data.domains), source))
    if not phases:
        raise ConfigError(f"recipe {recipe.name!r} trains nothing: it has neither tune sections nor stages")
    return Phases(tuple(phases), source.counted)


def _plan(
    recipe: Recipe,
    name: str,
    stage: StageConfig,
    specialists: tuple[str, ...],
    domains: Sequence[str],
    source: _Assumed | _Encoded,
) -> PhasePlan:
    records = source.records(specialists, domains)
    sampler = Sampler(
        {domain: len(part) for domain, part in records.items()},
        records_per_domain=stage.records_per_domain,
        seed=recipe.seed,
        composed_share=stage.composed_share,
        kind=recipe.train.sampler,
    )
    count = min(stage.steps, MOST_STEPS)
    steps = [i * stage.steps // count for i in range(count)]
    batches = tuple(tuple(source.draw(specialists, records, draw) for draw in sampler.batch(step)) for step in steps)
    return PhasePlan(
        name,
        stage,
        specialists,
        batches,
        num_records=sum(source.sizes[domain] for domain in domains),
        columns=sum(record.num_columns for batch in batches for record in batch) / count,
        responses=sum(record.num_response_tokens for batch in batches for record in batch) / count,
    )


@dataclass
class _Assumed:
    """Records that are all of one length."""

    data: DataConfig
    tokens: tuple[int, int]
    sizes: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = dict.fromkeys(self.data.domains, 0)
        if sum(self.tokens) > self.data.max_length:
            raise ConfigError(
                f"--tokens: {sum(self.tokens)} tokens are over data.max_length {self.data.max_length}: raise it"
            )

    @property
    def counted(self) -> str:
        prompt, response = self.tokens
        return f"no data was read: every record is taken to have {prompt} + {response} tokens, so none is padded"

    def records(self, specialists: Sequence[str], domains: Sequence[str]) -> dict[str, list[EncodedRecord]]:
        prompt, response = ((0,) * count for count in self.tokens)
        turn = EncodedTurn((prompt,) * len(specialists), response, (False,) * len(specialists))
        return {domain: [EncodedRecord("assumed", domain, (turn,))] for domain in domains}

    def draw(self, _: Sequence[str], records: Mapping[str, Sequence[EncodedRecord]], draw: Draw) -> EncodedRecord:
        record = records[draw.domain][draw.index]
        if draw.joined is None:
            return record
        (turn,) = record.turns
        twice = EncodedTurn(tuple(prompt * 2 for prompt in turn.prompts), turn.response * 2, turn.hides_end)
        joined = EncodedRecord("assumed", COMPOSED, (twice,))
        return truncate(joined, self.data.max_length) or record


class _Encoded:
    """The recipe's own records, encoded as training encodes them."""

    def __init__(self, recipe: Recipe, data: DataConfig) -> None:
        self.recipe, self.data = recipe, data
        first = next(iter(recipe.specialists.values()))
        try:
            self.tokenizer: Any = load_tokenizer(
                SpecialistConfig(model=recipe.tokenizer) if recipe.tokenizer else first
            )
        except ModelError as error:
            raise ModelError(f"{error}; or give --tokens PROMPT+RESPONSE, and no data is read") from error
        # The filter against benchmarks takes minutes on a large set and changes no length to speak of.
        dataset = load_dataset(data.model_copy(update={"benchmarks": None}))
        self.sizes = {domain: len(records) for domain, records in dataset["train"].items()}
        self.sources = {domain: _spread(records, MOST_RECORDS) for domain, records in dataset["train"].items()}
        self._encoders: dict[tuple[str, ...], Encoder] = {}

    @property
    def counted(self) -> str:
        parts = ", ".join(f"{domain} {len(self.sources[domain]):,} of {size:,}" for domain, size in self.sizes.items())
        unfiltered = ", not yet filtered against benchmarks" if self.data.benchmarks else ""
        return f"records encoded: {parts}{unfiltered}; at most {MOST_STEPS} steps of a phase drawn"

    def records(self, specialists: Sequence[str], domains: Sequence[str]) -> dict[str, list[EncodedRecord]]:
        encoder = self._encoder(specialists)
        chosen = {}
        for domain in domains:
            kept = encode_records(
                self.sources[domain],
                encoder,
                max_length=self.data.max_length,
                overlength=self.data.overlength,
                turns=self.data.turns,
            )
            if not kept:
                raise DataError(f"every record of {domain} is longer than max_length {self.data.max_length}")
            chosen[domain] = kept
        return chosen

    def draw(
        self, specialists: Sequence[str], records: Mapping[str, Sequence[EncodedRecord]], draw: Draw
    ) -> EncodedRecord:
        record = records[draw.domain][draw.index]
        if draw.joined is None:
            return record
        other = records[draw.joined[0]][draw.joined[1]]
        first, second = self._source(record), self._source(other)
        encoder = self._encoder(specialists)
        joined = encoder.encode(compose(first.messages, second.messages), id=f"{first.id}+{second.id}", domain=COMPOSED)
        if joined.num_columns <= self.data.max_length:
            return joined
        return truncate(joined, self.data.max_length) or record

    def _source(self, record: EncodedRecord) -> Record:
        return next(source for source in self.sources[record.domain] if source.id == record.id)

    def _encoder(self, specialists: Sequence[str]) -> Encoder:
        key = tuple(specialists)
        if key not in self._encoders:
            self._encoders[key] = self._make_encoder(specialists)
        return self._encoders[key]

    def _make_encoder(self, specialists: Sequence[str]) -> Encoder:
        templates = {name: self.recipe.specialists[name].template for name in specialists}
        tokenizers = {}
        for name in specialists:
            if templates[name] == "tokenizer":
                tokenizers[name] = load_tokenizer(self.recipe.specialists[name], name=name)
        return Encoder(self.tokenizer, resolve_templates(templates, list(specialists), self.tokenizer, tokenizers))


def _spread(records: Sequence[Record], most: int) -> list[Record]:
    """At most so many, evenly spread."""
    count = min(len(records), most)
    return [records[i * len(records) // count] for i in range(count)]
