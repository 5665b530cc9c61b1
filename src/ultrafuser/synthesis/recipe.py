"""A synthesis recipe: which domains, which models write, how much is asked for and what it may cost.

A YAML file fills these frozen models (`synthesis.load`). Numbers of topics and records come from the domains, whose
defaults are the paper's (Ding et al. 2024, arXiv 2403.08281: Table 1); a recipe overrides what it wants.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ultrafuser.config.section import Fraction, Name, Section

StageName = Literal[
    "meta_topics",
    "sub_topics",
    "fine_topics",  # optional: where a sub-topic must give more instructions than it can
    "instructions",
    "strong",  # strongly related instructions, from examples
    "weak",  # weakly related ones
    "free",  # optional: sampled without a topic, Magpie's way
    "complicated",  # a part of the pool, made more complex
    "evolved",  # optional: Evol-Instruct's depth and breadth
    "responses",
    "follow_ups",  # optional: the user's next turn
    "follow_up_responses",
]
INSTRUCTION_STAGES: tuple[StageName, ...] = ("instructions", "strong", "weak", "free")
TOPIC_STAGES: tuple[StageName, ...] = ("meta_topics", "sub_topics", "fine_topics")
GateName = Literal[
    "length",
    "duplicates",
    "near_duplicates",
    "refusals",
    "truncated",
    "language",
    "code",
    "evolution",
    "agreement",
    "overlap",
]


class Price(Section):
    """Money per million tokens."""

    input: NonNegativeFloat = 0.0
    output: NonNegativeFloat = 0.0


class EndpointConfig(Section):
    """One model at one or several OpenAI-compatible addresses. A key is read from the environment and never stored."""

    url: str | tuple[str, ...]  # up to and including /v1; several serve the same model
    model: str
    key_variable: str = "OPENAI_API_KEY"  # the environment variable that holds the key; unset: none is sent
    concurrency: PositiveInt = 32  # requests at once at each address, at most; fewer while it refuses
    requests_per_minute: PositiveFloat | None = None
    tokens_per_minute: PositiveFloat | None = None
    timeout_s: PositiveFloat = 300.0
    price: Price = Price()
    json_schema: Literal["auto", "always", "never"] = "auto"  # auto: until it is refused
    send_seed: bool = True
    extra_body: dict[str, Any] = {}  # further fields of every request, as the server wants them
    batch: Literal["no", "api", "files"] = "no"  # by OpenAI's Batch API, or by files of its format that you take there
    batch_price_factor: Fraction = 0.5  # what a batch costs of the price
    licence: str | None = None  # of what this model writes, for the data set's card

    @property
    def urls(self) -> tuple[str, ...]:
        """The addresses."""
        return (self.url,) if isinstance(self.url, str) else self.url


class SamplingConfig(Section):
    """How a stage asks. What is None comes from `default`, whose own defaults are given here."""

    endpoint: Name | tuple[Name, ...] | None = None  # several: each request has one of them, by its key
    temperature: NonNegativeFloat | None = None  # 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None  # 1.0
    max_tokens: PositiveInt | None = None  # 2048


class DomainConfig(Section):
    """One domain: a folder of prompts (`synthesis.domain`) and what the recipe changes of its settings."""

    folder: Path | None = None  # None: the one of this name that comes with the package
    settings: dict[str, Any] = {}  # as in the folder's domain.yaml, which they override key by key


class LimitsConfig(Section):
    """Where to stop. Requests under way count with the most they can cost."""

    max_cost: PositiveFloat | None = None  # in the money of the prices
    max_tokens: PositiveInt | None = None  # read and written
    max_attempts: PositiveInt = 8  # of a request, before it counts as failed
    give_up_after_s: PositiveFloat = 600.0  # without any answer of an endpoint


class ExportConfig(Section):
    """What is written at the end."""

    validation_fraction: Fraction = 0.02  # of the topics: a topic's records are all on one side
    licence: str = "other"
    name: str = "UltraChat 2, made again"


class SynthesisRecipe(Section):
    """All of a synthesis."""

    name: Name
    folder: Path | None = None  # None: runs/<name>
    database: str | None = None  # an SQLAlchemy URL; None: nodes.sqlite in the folder
    seed: NonNegativeInt = 0
    endpoints: dict[Name, EndpointConfig] = Field(min_length=1)
    stages: dict[Literal["default"] | StageName, SamplingConfig] = {}
    domains: dict[Name, DomainConfig] = Field(min_length=1)
    limits: LimitsConfig = LimitsConfig()
    benchmarks: Path | None = None  # a folder of test sets: what overlaps with them is dropped
    review_after: tuple[StageName, ...] = ()  # wait there until a person has looked at a sample
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _check_endpoints(self) -> Self:
        for stage, sampling in self.stages.items():
            for name in _names(sampling.endpoint):
                if name not in self.endpoints:
                    known = ", ".join(self.endpoints)
                    raise ValueError(f"stage {stage} asks endpoint {name!r}, which is not there; known: {known}")
        return self

    @property
    def run_folder(self) -> Path:
        """Where everything of the synthesis lies."""
        return self.folder if self.folder is not None else Path("runs") / self.name

    def sampling(self, stage: StageName) -> ResolvedSampling:
        """How a stage asks, with defaults filled in."""
        own, default = self.stages.get(stage, SamplingConfig()), self.stages.get("default", SamplingConfig())
        values = default.model_dump(exclude_none=True) | own.model_dump(exclude_none=True)
        values["endpoint"] = _names(values.get("endpoint")) or (next(iter(self.endpoints)),)
        return ResolvedSampling.model_validate(values)


class ResolvedSampling(Section):
    """`SamplingConfig` without gaps."""

    endpoint: tuple[Name, ...]
    temperature: NonNegativeFloat = 1.0
    top_p: float = 1.0
    max_tokens: PositiveInt = 2048


def _names(endpoint: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if endpoint is None:
        return ()
    return (endpoint,) if isinstance(endpoint, str) else tuple(endpoint)
