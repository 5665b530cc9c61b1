"""What a stage was planned with, so that a recipe that would have planned it otherwise is noticed.

Each setting belongs to the first stage that it bears on; a change is refused once that stage was planned. How it is
asked (addresses, limits, prices), what is exported and how much at once never matter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select

from ultrafuser.errors import ConfigError
from ultrafuser.synthesis.domain import Domain
from ultrafuser.synthesis.node import content_key
from ultrafuser.synthesis.recipe import StageName, SynthesisRecipe
from ultrafuser.synthesis.storage.database import Database
from ultrafuser.synthesis.storage.rounds import STAGE_ORDER
from ultrafuser.synthesis.storage.schema import basis

_HARMLESS = ("expected_tokens",)
_BY_STAGE = ("per_request", "rounds", "gates")  # sections with a key for each stage
# The first stage that a setting bears on; what is not named here bears on all.
_FIRST: dict[str, StageName] = {
    "sub_topics": "sub_topics",
    "fine_topics": "fine_topics",
    "records": "instructions",
    "margin": "instructions",
    "shares": "instructions",
    "forms": "instructions",
    "forms_per_request": "instructions",
    "examples": "strong",
    "free": "free",
    "complicated": "complicated",
    "angles": "complicated",
    "evolve": "evolved",
    "responses": "responses",
    "follow_ups": "follow_ups",
}


def facts_of(domain: Domain, recipe: SynthesisRecipe, stages: Sequence[StageName]) -> dict[StageName, dict[str, Any]]:
    """For each stage of a domain what it is planned with, as plain values by their place in the recipe."""
    facts: dict[StageName, dict[str, Any]] = {stage: {} for stage in stages}

    def add(first: StageName, place: str, value: Any) -> None:
        later = [stage for stage in stages if STAGE_ORDER.index(stage) >= STAGE_ORDER.index(first)]
        if later:
            facts[later[0]][place] = value

    add(STAGE_ORDER[0], "seed", recipe.seed)
    for stage in stages:
        for name, value in recipe.sampling(stage).model_dump(mode="json").items():
            facts[stage][f"stages.{stage}.{name}"] = value
        models = [recipe.endpoints[name].model for name in recipe.sampling(stage).endpoint]
        facts[stage]["models"] = models
    settings = domain.settings.model_dump(mode="json")
    for name, value in settings.items():
        if name in _BY_STAGE:
            for stage in stages:
                facts[stage][f"settings.{name}.{stage}"] = value.get(stage)
        elif name not in _HARMLESS:
            add(_FIRST.get(name, STAGE_ORDER[0]), f"settings.{name}", value)
    for file, prompt in domain.prompts.items():
        add(_stage_of(file), f"prompt {file}.md", content_key(prompt.text))
    if recipe.benchmarks is not None:
        for stage in stages:
            if (settings["gates"].get(stage) or {}).get("overlap") is not None:
                facts[stage]["benchmarks"] = str(recipe.benchmarks)
    return facts


def check_basis(database: Database, domain: str, facts: Mapping[StageName, Mapping[str, Any]]) -> None:
    """Compare with what planned stages were planned with.

    Raises:
        ConfigError: Something has changed that planned stages depend on; one line.
    """
    query = select(basis.c.stage, basis.c.facts).where(basis.c.domain == domain)
    planned = {row.stage: json.loads(row.facts) for row in database.rows(query)}
    for stage in STAGE_ORDER:
        if stage not in planned:
            continue
        before, now = planned[stage], json.loads(json.dumps(facts.get(stage, {})))
        if changed := [place for place in {**before, **now} if before.get(place) != now.get(place)]:
            changes = [_change(place, before.get(place), now.get(place)) for place in changed]
            if stage not in facts:
                changes = ["the settings have changed so that there is no such stage any more"]
            more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
            raise ConfigError(
                f"domain {domain}: since {stage} was planned, {'; '.join(changes[:3])}{more}: go on with --from {stage}"
                ", which asks only what was never asked, or take the change back, or another run folder"
            )


def remember_basis(database: Database, domain: str, stage: StageName, facts: Mapping[str, Any]) -> None:
    """This stage is planned with these facts."""
    row = {"domain": domain, "stage": stage, "facts": json.dumps(facts)}
    with database.transaction():
        database.write(database.insert(basis).on_conflict_do_nothing(), row)


def _stage_of(file: str) -> StageName:
    if file.startswith("evolve_"):
        return "evolved"
    return file if file in STAGE_ORDER else STAGE_ORDER[0]


def _change(place: str, before: Any, now: Any) -> str:
    if place.startswith("prompt "):
        return f"the {place} has changed"
    return f"{place} has changed from {_short(before)} to {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
