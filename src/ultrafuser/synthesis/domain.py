"""A domain: a folder of prompt files and a `domain.yaml` of settings, one of those we ship or the user's own.

Prompt files that a folder does not have are taken from `domains/shared`, settings that it does not give from
`domains/shared/defaults.yaml`; a recipe overrides settings key by key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from ultrafuser.config.section import Fraction, Section
from ultrafuser.errors import ConfigError
from ultrafuser.synthesis.gates.settings import StageGates
from ultrafuser.synthesis.prompt import Prompt, load_prompt
from ultrafuser.synthesis.recipe import DomainConfig, StageName

SHIPPED = Path(__file__).with_name("domains")
SHARED = SHIPPED / "shared"
EVOLVE_METHODS = ("constraints", "deepen", "concretise", "reasoning")  # in depth: WizardLM's
_EVERYWHERE = ("domain", "about", "language")
_TOPIC = ("topic", "relevance", "use_case", "path")
_NEEDS: dict[str, tuple[str, ...]] = {
    "meta_topics": ("count", "avoid", "format"),
    "sub_topics": ("topic", "count", "avoid", "format"),
    "fine_topics": ("topic", "count", "avoid", "format"),
    "instructions": ("topic", "count", "avoid", "format"),
    "strong": ("examples", "count", "avoid", "format"),
    "weak": ("examples", "count", "avoid", "format"),
    "complicated": ("instruction", "format"),
    "evolved": ("instruction", "method", "format"),
    "responses": (),
    "follow_ups": ("conversation", "format"),
    **{f"evolve_{method}": () for method in (*EVOLVE_METHODS, "breadth")},
}
_KNOWS: dict[str, tuple[str, ...]] = {
    "sub_topics": _TOPIC,
    "fine_topics": _TOPIC,
    "instructions": (*_TOPIC, "forms"),
    "strong": (*_TOPIC, "forms"),
    "weak": (*_TOPIC, "forms"),
    "complicated": ("angle",),
}


class Shares(Section):
    """Which part of a domain's instructions each stage makes. The paper gives no numbers; these are ours."""

    instructions: Fraction = 0.4
    strong: Fraction = 0.3
    weak: Fraction = 0.3
    free: Fraction = 0.0  # sampled without a topic, Magpie's way: needs `free.prefix`

    @model_validator(mode="after")
    def _check_sum(self) -> Self:
        total = self.instructions + self.strong + self.weak + self.free
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares of instructions, strong, weak and free make {total:g}: they must make 1")
        if self.instructions == 0 and self.strong + self.weak > 0:
            raise ValueError("strong and weak are made from instructions: give those a share, too")
        return self


class PerRequest(Section):
    """How many items one request asks for."""

    meta_topics: PositiveInt = 30
    sub_topics: PositiveInt = 20
    fine_topics: PositiveInt = 20
    instructions: PositiveInt = 10
    strong: PositiveInt = 5
    weak: PositiveInt = 5


class Rounds(Section):
    """How often each stage asks, at most; what is wanted of a topic is spread over all but the last round."""

    meta_topics: PositiveInt = 4
    sub_topics: PositiveInt = 5
    fine_topics: PositiveInt = 4
    instructions: PositiveInt = 6
    strong: PositiveInt = 5
    weak: PositiveInt = 5
    free: PositiveInt = 4
    complicated: PositiveInt = 2
    responses: PositiveInt = 3
    follow_ups: PositiveInt = 2
    follow_up_responses: PositiveInt = 2


class EvolveSettings(Section):
    """Evol-Instruct (Xu et al. 2023, arXiv 2304.12244): off unless a share is given."""

    share: Fraction = 0.0  # of all instructions
    breadth: Fraction = 0.2  # part of it that becomes a new instruction beside the old one
    generations: PositiveInt = 1  # how often what was evolved in depth is evolved again


class FreeSettings(Section):
    """Free sampling (Xu et al. 2024, arXiv 2406.08464): a chat model goes on where a user's turn begins."""

    prefix: str | None = None  # the model's template up to the user's first word
    stop: tuple[str, ...] = ()  # what its template writes after that turn


class ResponseSettings(Section):
    """How instructions are answered."""

    samples: PositiveInt = 1  # answers of each instruction; 2 for the gate `agreement`, which keeps one


class FollowUpSettings(Section):
    """A user's further turns: off unless a share is given."""

    share: Fraction = 0.0  # of all responses


class DomainSettings(Section):
    """How much of what a domain makes, and how. Counts of the domains we ship are the paper's (Table 1)."""

    title: str = Field(min_length=1)  # as prompts call the domain
    about: str = Field(min_length=1)  # a sentence or two: what belongs to it
    language: str = Field(default="en", pattern="^[a-z]{2,3}$")  # ISO 639-1
    language_name: str = "English"  # as prompts call it
    meta_topics: PositiveInt
    sub_topics: PositiveInt  # of all meta-topics together
    fine_topics: NonNegativeInt = 0  # of all sub-topics together; 0: instructions are asked of sub-topics
    records: PositiveInt
    margin: float = Field(default=1.05, ge=1, le=3)  # instructions for each record, since some answers are lost
    shares: Shares = Shares()
    per_request: PerRequest = PerRequest()
    rounds: Rounds = Rounds()
    examples: PositiveInt = 4  # shown in a request for related instructions
    max_avoid: NonNegativeInt = 40  # of what there is already, shown in a request so as not to be repeated
    max_avoid_characters: PositiveInt = 160  # of each of these
    forms: tuple[str, ...] = ()  # kinds of task, some of which each request for instructions names
    forms_per_request: PositiveInt = 4
    complicated: Fraction = 0.3  # part of the instructions that is made more complex: the paper's
    angles: tuple[str, ...] = Field(min_length=1)  # ways of making an instruction more complex, one a request
    evolve: EvolveSettings = EvolveSettings()
    free: FreeSettings = FreeSettings()
    responses: ResponseSettings = ResponseSettings()
    follow_ups: FollowUpSettings = FollowUpSettings()
    gates: dict[StageName, StageGates] = {}
    expected_tokens: dict[StageName, PositiveInt]  # of one answer, for estimates before anything was asked

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sub_topics < self.meta_topics:
            raise ValueError(f"sub_topics {self.sub_topics} is less than meta_topics {self.meta_topics}")
        if 0 < self.fine_topics < self.sub_topics:
            raise ValueError(f"fine_topics {self.fine_topics} is less than sub_topics {self.sub_topics}; 0: none")
        if self.shares.free > 0 and not self.free.prefix:
            raise ValueError("shares.free needs free.prefix: the model's chat template up to the user's first word")
        responses = self.gates.get("responses", StageGates())
        if responses.agreement is not None and self.responses.samples < 2:
            raise ValueError("the gate agreement compares answers: set responses.samples to 2 or more")
        if responses.agreement is None and self.responses.samples > 1:
            raise ValueError("several responses.samples need the gate agreement, which keeps one of them")
        return self

    @property
    def topic_stages(self) -> tuple[StageName, ...]:
        """The stages of topics, the last of which instructions are asked of."""
        return ("meta_topics", "sub_topics", *(("fine_topics",) if self.fine_topics else ()))


@dataclass(frozen=True)
class Domain:
    """A domain, ready to be asked about.

    Attributes:
        prompts: By the name of their file, which is that of their stage.
    """

    name: str
    settings: DomainSettings
    prompts: Mapping[str, Prompt]

    @property
    def common(self) -> dict[str, str]:
        """What every prompt may name."""
        return {"domain": self.settings.title, "about": self.settings.about, "language": self.settings.language_name}


def shipped_domains() -> list[str]:
    """Names of the domains that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/domain.yaml"))


def load_domain(name: str, config: DomainConfig) -> Domain:
    """Read a domain's folder.

    Args:
        name: In the recipe; also that of the folder, unless `config` names another.

    Raises:
        ConfigError: No such domain, a setting that does not fit, or a prompt file that lacks something; one line.
    """
    folder = config.folder if config.folder is not None else SHIPPED / name
    path = folder / "domain.yaml"
    if not path.is_file():
        known = ", ".join(shipped_domains())
        where = f"{folder} holds no domain.yaml: write one" if config.folder is not None else "none comes with us"
        raise ConfigError(f"domain {name!r}: {where} (with the package come {known}; others need `folder`)")
    tree = _merged(_merged(_yaml(SHARED / "defaults.yaml"), _yaml(path)), config.settings)
    try:
        settings = DomainSettings.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"domain {name!r} ({path} and the recipe's settings): {_problems(error)}") from None
    prompts = {
        file: load_prompt(
            own if (own := folder / f"{file}.md").exists() else SHARED / own.name,
            needs=needs,
            knows=(*_EVERYWHERE, *_KNOWS.get(file, ())),
        )
        for file, needs in _NEEDS.items()
    }
    _refuse_strangers(folder, prompts)
    return Domain(name, settings, prompts)


def _refuse_strangers(folder: Path, prompts: Mapping[str, Prompt]) -> None:
    """A misspelt file name would leave the user's prompt unread."""
    for path in sorted(folder.glob("*.md")):
        if path.stem not in prompts and path.stem.lower() != "readme":
            raise ConfigError(f"{path} is no prompt of any stage: name it as one of {', '.join(prompts)}")


def _yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping with keys such as title and records")
    return tree


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, mapping by mapping; null takes a value away."""
    merged = dict(base)
    for key, value in over.items():
        mine = merged.get(key)
        merged[key] = _merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return merged


def _problems(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(str(part) for part in item['loc']) or 'settings'}: {item['msg']}"
        + (f" (got {item['input']!r:.60})" if item["type"] not in ("missing", "value_error") else "")
        for item in error.errors()
    )
