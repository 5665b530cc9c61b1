"""What a run will take, on paper: calls, tokens, money and hours, stage by stage, before anything is asked.

Numbers of requests come from the domains' counts, lengths of prompts from their files, lengths of answers from their
`expected_tokens`; where a stage has answered at least thirty requests, its own means take the place of both.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ultrafuser.synthesis.asking.endpoints.usage import BYTES_PER_TOKEN, cost
from ultrafuser.synthesis.domain import Domain, load_domain
from ultrafuser.synthesis.queue import Spent
from ultrafuser.synthesis.recipe import EndpointConfig, StageName, SynthesisRecipe
from ultrafuser.synthesis.stages.build import Target, targets

MIN_MEASURED = 30  # answers before their means are trusted
TOKENS_PER_S = 40.0  # of one answer while others are written: an assumption
FIRST_TOKEN_S = 1.0  # and so is this
BATCH_H = 24.0  # what a batch may take


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """What one stage of one domain will take.

    Attributes:
        num_done: Answers that there are already; they count in the rest, too.
        hours: If nothing else is asked meanwhile.
        is_measured: Tokens are means of answers, and not expectations.
    """

    domain: str
    stage: StageName
    num_calls: int
    num_items: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    hours: float
    num_done: int = 0
    is_measured: bool = False

    @property
    def tokens(self) -> int:
        """Read and written."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Estimate:
    """All stages, and what limits and assumptions they stand on."""

    stages: tuple[StageEstimate, ...]
    notes: tuple[str, ...]
    hours: float

    @property
    def num_calls(self) -> int:
        """Requests, if none is repeated."""
        return sum(stage.num_calls for stage in self.stages)

    @property
    def cost(self) -> float:
        """In the money of the recipe's prices."""
        return sum(stage.cost for stage in self.stages)

    @property
    def tokens(self) -> int:
        """Read and written."""
        return sum(stage.tokens for stage in self.stages)

    def table(self, width: int = 120) -> str:
        """For the eye."""
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, show_footer=True)
        completion = sum(s.completion_tokens for s in self.stages)
        footers = ["", "total", f"{self.num_calls:,}", f"{sum(s.num_done for s in self.stages):,}"]
        footers += [_millions(self.tokens - completion), _millions(completion), f"{self.cost:,.2f}"]
        heads = ["domain", "stage", "calls", "done", "tokens in", "tokens out", "money"]
        for head, footer in zip([*heads, "hours", "lengths"], [*footers, f"{self.hours:,.1f}", ""], strict=True):
            table.add_column(head, footer, justify="left" if head in ("domain", "stage", "lengths") else "right")
        before = None
        for s in self.stages:
            numbers = [
                f"{s.num_calls:,}",
                f"{s.num_done:,}",
                _millions(s.prompt_tokens),
                _millions(s.completion_tokens),
            ]
            how = "measured" if s.is_measured else "expected"
            name = "" if s.domain == before else s.domain
            table.add_row(name, s.stage, *numbers, f"{s.cost:,.2f}", f"{s.hours:,.2f}", how)
            before = s.domain
        console = Console(file=io.StringIO(), width=width, highlight=False)
        console.print(table)
        for note in self.notes:
            console.print(note, soft_wrap=True)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip()


def estimate(recipe: SynthesisRecipe) -> Estimate:
    """What all of a recipe will take; answers in its database are used, if there are any.

    Raises:
        ConfigError: A domain of the recipe is wrong.
        SynthesisError: There is a database, and it cannot be read.
    """
    domains = [load_domain(name, config) for name, config in recipe.domains.items()]
    return estimate_domains(recipe, domains, _measured(recipe))


def estimate_domains(
    recipe: SynthesisRecipe, domains: Sequence[Domain], measured: Mapping[tuple[str, str], Spent] | None = None
) -> Estimate:
    """The same of domains and sums of answers by domain and stage; a pure function."""
    measured = measured or {}
    stages = tuple(
        _stage(recipe, domain.name, target, measured.get((domain.name, target.stage), Spent()))
        for domain in domains
        for target in targets(domain)
    )
    return Estimate(stages, tuple(_notes(recipe, stages)), _total_hours(recipe, stages))


def _stage(recipe: SynthesisRecipe, domain: str, target: Target, spent: Spent) -> StageEstimate:
    sampling = recipe.sampling(target.stage)
    configs = [recipe.endpoints[name] for name in sampling.endpoint]
    is_measured = spent.num_answers >= MIN_MEASURED
    if is_measured:
        read, written = spent.prompt_tokens / spent.num_answers, spent.completion_tokens / spent.num_answers
    else:
        read = target.prompt_characters / BYTES_PER_TOKEN
        written = float(min(target.answer_tokens, sampling.max_tokens))
    num_calls = max(target.requests, spent.num_answers)
    read_all, written_all = math.ceil(num_calls * read), math.ceil(num_calls * written)
    money = sum(cost(c, read_all, written_all, is_batch=c.batch != "no") for c in configs) / len(configs)
    # Each of several endpoints has its part of the requests, so the slowest decides.
    hours = max(_hours(config, num_calls / len(configs), read, written) for config in configs)
    return StageEstimate(
        domain,
        target.stage,
        num_calls,
        target.items,
        read_all,
        written_all,
        money,
        hours,
        spent.num_answers,
        is_measured,
    )


def _hours(config: EndpointConfig, num_calls: float, read: float, written: float) -> float:
    """At an endpoint's limits; the narrowest of them decides."""
    if config.batch != "no":
        return BATCH_H if num_calls else 0.0
    by_concurrency = (
        num_calls * (FIRST_TOKEN_S + written / TOKENS_PER_S) / (config.concurrency * len(config.urls)) / 3600
    )
    by_requests = num_calls / config.requests_per_minute / 60 if config.requests_per_minute else 0.0
    by_tokens = num_calls * (read + written) / config.tokens_per_minute / 60 if config.tokens_per_minute else 0.0
    return max(by_concurrency, by_requests, by_tokens)


def _total_hours(recipe: SynthesisRecipe, stages: Sequence[StageEstimate]) -> float:
    """Stages of a domain follow one another, domains run side by side and share the endpoints."""
    domains: dict[str, float] = {}
    endpoints: dict[str, float] = {}
    for stage in stages:
        domains[stage.domain] = domains.get(stage.domain, 0.0) + stage.hours
        for name in recipe.sampling(stage.stage).endpoint:
            if recipe.endpoints[name].batch == "no":
                endpoints[name] = endpoints.get(name, 0.0) + stage.hours
    return max([*domains.values(), *endpoints.values()], default=0.0)


def _notes(recipe: SynthesisRecipe, stages: Sequence[StageEstimate]) -> list[str]:
    done = sum(stage.num_done for stage in stages)
    left = sum(stage.num_calls for stage in stages) - done
    notes = [
        f"{left:,} calls are left, repeated ones not counted. Hours: at each "
        f"endpoint's concurrency with {TOKENS_PER_S:g} tokens/s for each answer (an assumption), or at its requests "
        "and tokens per minute where these are narrower; stages of a domain in turn, domains side by side."
    ]
    money, tokens = sum(stage.cost for stage in stages), sum(stage.tokens for stage in stages)
    used = {name for stage in stages for name in recipe.sampling(stage.stage).endpoint}
    if free := [n for n in used if not (recipe.endpoints[n].price.input or recipe.endpoints[n].price.output)]:
        notes.append(f"Without a price in the recipe, so counted as free: {', '.join(sorted(free))}.")
    if batched := [name for name in used if recipe.endpoints[name].batch != "no"]:
        notes.append(f"By batches, each of which may take {BATCH_H:g} hours: {', '.join(sorted(batched))}.")
    limits = recipe.limits
    if limits.max_cost is not None and money > limits.max_cost:
        notes.append(f"limits.max_cost is {limits.max_cost:g}: the run will end there, before it is complete.")
    if limits.max_tokens is not None and tokens > limits.max_tokens:
        notes.append(f"limits.max_tokens is {limits.max_tokens:,}: the run will end there, before it is complete.")
    return notes


def _measured(recipe: SynthesisRecipe) -> dict[tuple[str, str], Spent]:
    if recipe.database is None and not (recipe.run_folder / "nodes.sqlite").exists():
        return {}
    from ultrafuser.synthesis.storage.store import Store

    with Store.open(recipe, read_only=True) as store:
        return {(count.domain, count.stage): count.spent for count in store.progress()}


def _millions(tokens: int) -> str:
    return f"{tokens / 1e6:,.2f}M" if tokens >= 10_000 else f"{tokens:,}"
