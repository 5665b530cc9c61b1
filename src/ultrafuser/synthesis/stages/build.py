"""The stages that a domain wants, in their order, and how much each of them asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ultrafuser.synthesis.domain import Domain
from ultrafuser.synthesis.recipe import StageName, SynthesisRecipe
from ultrafuser.synthesis.stages.ask import Asker
from ultrafuser.synthesis.stages.base import Stage
from ultrafuser.synthesis.stages.follow_ups import FollowUpResponseStage, FollowUpStage
from ultrafuser.synthesis.stages.free import FreeStage
from ultrafuser.synthesis.stages.instructions import instruction_stages
from ultrafuser.synthesis.stages.responses import ResponseStage
from ultrafuser.synthesis.stages.rewrite import ComplicatedStage, EvolvedStage
from ultrafuser.synthesis.stages.topics import topic_stages


def build_stages(domain: Domain, recipe: SynthesisRecipe) -> list[Stage]:
    """The stages of a domain, in the order in which they run; optional ones where its settings want them."""
    settings, rounds = domain.settings, domain.settings.rounds
    stages: list[Stage] = [*topic_stages(domain, recipe), *instruction_stages(domain, recipe)]
    if settings.shares.free > 0:
        assert settings.free.prefix is not None
        stages.append(
            FreeStage(
                target=math.ceil(settings.records * settings.shares.free * settings.margin - 1e-6),
                max_rounds=rounds.free,
                prefix=settings.free.prefix,
                stop=settings.free.stop,
                asker=Asker("free", domain, recipe),
            )
        )
    if settings.complicated > 0:
        stages.append(
            ComplicatedStage(
                share=settings.complicated,
                max_rounds=rounds.complicated,
                angles=settings.angles,
                asker=Asker("complicated", domain, recipe),
            )
        )
    if settings.evolve.share > 0:
        stages.append(
            EvolvedStage(
                share=settings.evolve.share,
                breadth=settings.evolve.breadth,
                max_rounds=settings.evolve.generations,
                asker=Asker("evolved", domain, recipe),
            )
        )
    stages.append(
        ResponseStage(
            target=settings.records,
            samples=settings.responses.samples,
            max_rounds=rounds.responses,
            asker=Asker("responses", domain, recipe),
        )
    )
    if settings.follow_ups.share > 0:
        stages.append(
            FollowUpStage(
                share=settings.follow_ups.share,
                max_rounds=rounds.follow_ups,
                asker=Asker("follow_ups", domain, recipe),
            )
        )
        stages.append(FollowUpResponseStage(rounds.follow_up_responses, Asker("follow_up_responses", domain, recipe)))
    return stages


@dataclass(frozen=True, slots=True)
class Target:
    """What a stage comes to if nothing is lost, for estimates.

    Attributes:
        items: That are to be kept.
        requests: That ask for them.
        prompt_characters: Of one request, roughly: its prompt and what usually fills it.
        answer_tokens: Of one answer.
    """

    stage: StageName
    items: int
    requests: int
    prompt_characters: int
    answer_tokens: int


def targets(domain: Domain) -> list[Target]:
    """How much each stage of a domain will ask for, before anything was asked."""
    settings = domain.settings
    pool = settings.records * settings.margin
    above = {"meta_topics": 1, "sub_topics": settings.meta_topics, "fine_topics": settings.sub_topics}
    leaves = getattr(settings, settings.topic_stages[-1])
    found: list[Target] = []

    def add(stage: StageName, items: int | float, requests: int | float, filled: int) -> None:
        file = "responses" if stage == "follow_up_responses" else stage
        characters = len(domain.prompts[file].text) if file in domain.prompts else len(settings.free.prefix or "")
        tokens = settings.expected_tokens[stage]
        found.append(Target(stage, math.ceil(items), math.ceil(requests), characters + filled, tokens))

    for stage in settings.topic_stages:
        wanted, per_request = getattr(settings, stage), getattr(settings.per_request, stage)
        add(stage, wanted, above[stage] * math.ceil(wanted / above[stage] / per_request), 600)
    names: tuple[StageName, ...] = ("instructions", "strong", "weak")
    for stage in names:
        wanted, per_request = pool * getattr(settings.shares, stage), getattr(settings.per_request, stage)
        if wanted:
            shown = settings.max_avoid * settings.max_avoid_characters // 3
            add(stage, wanted, leaves * math.ceil(wanted / leaves / per_request), 500 + shown)
    if settings.shares.free:
        add("free", pool * settings.shares.free, pool * settings.shares.free, 0)
    if settings.complicated:
        add("complicated", pool * settings.complicated, pool * settings.complicated, 300)
    if settings.evolve.share:
        deep = sum((1 - settings.evolve.breadth) ** number for number in range(settings.evolve.generations))
        add("evolved", pool * settings.evolve.share * deep, pool * settings.evolve.share * deep, 500)
    add("responses", settings.records, settings.records * settings.responses.samples, 300)
    if settings.follow_ups.share:
        turns = settings.records * settings.follow_ups.share
        add("follow_ups", turns, turns, 2500)
        add("follow_up_responses", turns, turns, 2500)
    return found
