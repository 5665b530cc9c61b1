"""A recipe: everything needed to make one fused model, and nothing else.

A YAML file fills these frozen models (`ultrafuser.config.load`). The defaults are the paper's where the
paper gives a value (Ding et al. 2024, arXiv 2403.08281: Section 3.1, Algorithm 1, Appendix B) and say so;
unknown keys are errors, never dropped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ultrafuser.config.section import Fraction, Name, Section
from ultrafuser.config.training import StageConfig, TrainConfig, TuneConfig


class SpecialistConfig(Section):
    """One specialist: where its weights come from and how it is spoken to."""

    model: str  # a folder, a hub id (owner/name), or a folder or hub id that holds `gguf_file`
    revision: str | None = None  # hub commit, branch or tag
    gguf_file: str | None = None
    adapter: str | None = None  # a PEFT adapter (folder or hub id), merged into the model at load
    template: str = "tokenizer"  # a name of the template library, "tokenizer", or a path to a .jinja file
    trust_remote_code: bool = False
    tune: TuneConfig | None = None


class GateConfig(Section):
    """The gate: two linear layers with ReLU between, hidden size 512 (Section 3.1, Appendix B)."""

    hidden_size: PositiveInt = 512
    num_layers: PositiveInt = 2
    granularity: Literal["token", "prompt"] = "token"


class FusionConfig(Section):
    """How specialists are combined; the defaults are Equation 1."""

    space: Literal["logits", "logprobs", "probs"] = "logits"
    weighting: Literal["gate", "uniform", "perplexity"] = "gate"
    perplexity_temperature: PositiveFloat = 1.0


class SourceConfig(Section):
    """Records of one domain: a file, a folder or `hub:owner/name`."""

    path: str
    file_format: str = "auto"
    limit: PositiveInt | None = None
    domain_field: str | None = None


class DomainConfig(Section):
    """One domain: its sources in order."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)


class DataConfig(Section):
    """The training data and how it is cut into splits and tokens."""

    domains: dict[Name, DomainConfig] = Field(min_length=1)
    validation_fraction: Fraction = 0.02
    test_fraction: Fraction = 0.0
    max_length: PositiveInt = 2048  # columns of an encoded record, in tokens
    overlength: Literal["drop", "truncate", "error"] = "drop"
    bad_records: Literal["raise", "skip"] = "raise"  # skip counts and reports them
    turns: Literal["all", "last"] = "all"  # train on every response of a conversation or the last alone
    benchmarks: str | None = None  # a folder of benchmark files; records that share a 13-gram are dropped
    overlap_policy: Literal["any", "coverage"] = "any"  # any: one shared 13-gram is enough, as in the paper
    overlap_coverage: Fraction = 0.5  # the part of a test item that a record must hold under the policy coverage


class Recipe(Section):
    """One fused model, from ingredients to weights."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    output: Path | None = None  # None: runs/<name>
    seed: NonNegativeInt = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the specialists' weights in memory
    specialists: dict[Name, SpecialistConfig] = Field(min_length=1)
    shared_base: bool = False  # the specialists are adapters of one model, whose weights are then kept once
    tokenizer: str | None = None  # None: the first specialist's
    gate: GateConfig = GateConfig()
    fusion: FusionConfig = FusionConfig()
    data: DataConfig | None = None
    train: TrainConfig = TrainConfig()
    stage1: StageConfig | None = StageConfig()
    stage2: StageConfig | None = None

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return self.output if self.output is not None else Path("runs") / self.name

    @model_validator(mode="after")
    def _check_tuned_domains(self) -> Self:
        for name, specialist in self.specialists.items():
            known = set(self.data.domains) if self.data is not None else set()
            if specialist.tune is not None and (unknown := set(specialist.tune.domains) - known):
                raise ValueError(
                    f"specialists.{name}.tune.domains names {', '.join(sorted(unknown))}, but data.domains has "
                    f"{', '.join(sorted(known)) or 'none'}"
                )
        return self

    @model_validator(mode="after")
    def _check_cached_stage(self) -> Self:
        if self.train.stage1_cache.mode != "off" and self.stage1 is not None and self.stage1.train_specialists:
            raise ValueError(
                "train.stage1_cache keeps hidden states of frozen specialists, but stage1.train_specialists is true: "
                "set one of them otherwise"
            )
        return self

    @model_validator(mode="after")
    def _check_adapters(self) -> Self:
        tuned = {f"specialists.{name}.tune": source.tune for name, source in self.specialists.items()}
        for place, stage in {"stage1": self.stage1, "stage2": self.stage2, **tuned}.items():
            if stage is None:
                continue
            if stage.lora is not None and not stage.train_specialists:
                raise ValueError(f"{place}.lora adapts specialists, but {place}.train_specialists is false")
            if self.shared_base and stage.train_specialists and stage.lora is None:
                raise ValueError(
                    f"shared_base keeps one copy of all weights but adapters, so {place} needs lora: to train "
                    "specialists whole, set shared_base: false"
                )
        if self.shared_base and self.train.stage1_cache.mode != "off":
            raise ValueError(
                "shared_base holds all specialists in the memory of one, train.stage1_cache holds one at a time: set "
                "one of them otherwise"
            )
        return self
