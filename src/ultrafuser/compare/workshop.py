"""How each model of the comparison is made from a recipe: all from the same specialists, data and steps.

The budget is that of the fusion: as many steps as both stages together, with stage 2's batch and rates. What was
trained before (by `train`, `demo` or an earlier comparison in the same folder) is taken from its checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ultrafuser.baselines.btx import start_btx
from ultrafuser.baselines.fusechat import DistillingTrio
from ultrafuser.baselines.merging import MergeMethod, merge_weights
from ultrafuser.baselines.routing import RoutedGenerator
from ultrafuser.baselines.selection import ChooseByJudge, ChooseByScore, Chooser, RewardModel, SelectingGenerator
from ultrafuser.config.recipe import Recipe, SpecialistConfig
from ultrafuser.config.training import StageConfig, TuneConfig
from ultrafuser.errors import ConfigError
from ultrafuser.evaluation.losses import score_losses
from ultrafuser.evaluation.models import model_digest
from ultrafuser.generation import Generator
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.generator import FusedGenerator
from ultrafuser.train.tracking.metrics import read_metrics
from ultrafuser.train.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Made:
    """A model to examine and what it cost: parameters that were trained, phases whose steps were paid for."""

    generator: Generator
    model: FusedForCausalLM
    phases: tuple[str, ...] = ()
    has_distribution: bool = True  # a chosen answer has none


@dataclass(frozen=True, slots=True)
class Plan:
    """A row to come: its name, one line on how it is made, and the function that makes it."""

    name: str
    what: str
    make: Callable[[], Made]


class Workshop:
    """Makes the models of a comparison.

    Args:
        recipe: With specialists, data and both stages.
        reward_model: Folder or hub id of a reward model, for selection.
        ask_judge: Prompts to replies of a judge, for selection.
        judge_name: Who that is.

    Raises:
        ConfigError: The recipe fuses a single model, or lacks a stage.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        reward_model: str | None = None,
        ask_judge: Callable[[Sequence[str]], list[str]] | None = None,
        judge_name: str = "a judge",
    ) -> None:
        if len(recipe.specialists) < 2 or recipe.stage1 is None or recipe.stage2 is None:
            raise ConfigError("a comparison needs at least two specialists, stage1 and stage2 in the recipe")
        self.recipe, self.stage1, self.stage2 = recipe, recipe.stage1, recipe.stage2
        self.trainer, self.reward_model = Trainer(recipe), reward_model
        self.ask_judge, self.judge_name = ask_judge, judge_name
        self.folder = self.trainer.folder / "compare"

    def plans(self) -> Iterator[Plan]:
        """All models, in the order of the table."""
        names = list(self.recipe.specialists)
        for name in names:
            yield Plan(f"specialist:{name}", "as it comes", partial(self._specialist, name))
        for name in names:
            yield Plan(f"further-tuned:{name}", "trained on all domains", partial(self._further, name))
        yield Plan("average", "mean of the weights", partial(self._merged, "linear"))
        yield Plan("task-arithmetic", "sum of the mean differences", partial(self._merged, "task_arithmetic"))
        yield Plan("ties", "TIES merge, density .5", partial(self._merged, "ties"))
        yield Plan("btx", "mixture of the feed-forward layers, trained", self._btx)
        yield Plan("fusechat", "pairwise distillation into the first specialist, then SCE", self._fusechat)
        yield Plan("uniform", "equal weights on the logits, untrained", partial(self._weighted, "uniform"))
        yield Plan("packllm", "weights from each prompt's perplexity, untrained", partial(self._weighted, "perplexity"))
        yield Plan("copies", "as many copies of the common base, fused in both stages", self._copies)
        yield Plan("direct", "everything from the start, no stages, no balance", self._direct)
        yield Plan("fused:stage1", "the gate alone", partial(self._fused, last="stage1"))
        yield Plan("fused:stage2", "then everything", partial(self._fused, last="stage2"))
        yield Plan("routed", "the gate sends each prompt to one specialist", self._routed)
        if self.reward_model is not None:
            what = f"the specialists' answer that the reward model {self.reward_model} prefers"
            yield Plan("selected:reward-model", what, self._selected_by_reward)
        if self.ask_judge is not None:
            what = f"the specialists' answer that {self.judge_name} prefers"
            yield Plan("selected:judge", what, self._selected_by_judge)

    @cached_property
    def specialists(self) -> dict[str, SpecialistConfig]:
        """The specialists, tuned where the recipe says so."""
        return {name: self.trainer.tuned_specialist(name) for name in self.recipe.specialists}

    @property
    def ingredients(self) -> dict[str, SpecialistConfig]:
        """All that the models are made from: the specialists, and what they were tuned from."""
        bases = {f"the base of {n}": source for n, source in self.recipe.specialists.items() if source.tune is not None}
        return {f"specialist {name}": source for name, source in self.specialists.items()} | bases

    @property
    def budget(self) -> StageConfig:
        """A stage as long as both stages of the fusion together."""
        return self.stage2.model_copy(update={"steps": self.stage1.steps + self.stage2.steps, "gate_entropy": 0.0})

    def _base(self) -> Path:
        """The folder that all specialists were tuned from."""
        sources = {source.model for source in self.recipe.specialists.values() if source.tune is not None}
        if len(sources) != 1 or any(source.tune is None for source in self.recipe.specialists.values()):
            raise ConfigError("the specialists have no common base in this recipe")
        return self._local(Path(sources.pop()))

    def _folders(self) -> list[Path]:
        return [self._local(Path(source.model)) for source in self.specialists.values()]

    @staticmethod
    def _local(path: Path) -> Path:
        if not path.is_dir():
            raise ConfigError(f"merging works on folders, and {path} is none: download the model first")
        return path

    def _generator(self, model: FusedForCausalLM) -> FusedGenerator:
        model.train(False)
        return FusedGenerator(model, self.trainer.tokenizer)

    def _made(self, model: FusedForCausalLM, *phases: str) -> Made:
        return Made(self._generator(model), model, phases)

    def _specialist(self, name: str) -> Made:
        return self._lone(self.specialists[name])

    def _lone(self, source: SpecialistConfig, *phases: str) -> Made:
        return self._made(self.trainer.build({"alone": source}), *phases)

    def _in_best_template(self, folder: Path, *phases: str) -> Made:
        """A merged model belongs to no template: it gets the specialist's that suits it best on validation records."""
        templates = list(dict.fromkeys(source.template for source in self.specialists.values()))
        made = [self._lone(SpecialistConfig(model=str(folder), template=template), *phases) for template in templates]
        held_out = [r.messages for records in self.trainer.dataset["validation"].values() for r in records]
        return min(made, key=lambda one: score_losses(one.generator, held_out).loss.value)

    def _tuned(self, name: str, source: SpecialistConfig) -> SpecialistConfig:
        """A model trained on all domains for the whole budget, kept as `specialists/<name>`."""
        tune = TuneConfig.model_validate(
            {**self.budget.model_dump(), "domains": list(self.trainer.data.domains), "train_specialists": True}
        )
        part = self.recipe.model_copy(update={"specialists": {name: source.model_copy(update={"tune": tune})}})
        return Trainer(part, dataset=self.trainer.dataset).tuned_specialist(name)

    def _further(self, name: str) -> Made:
        kept = f"further_{name}"
        return self._lone(self._tuned(kept, self.specialists[name]), f"tune-{kept}")

    def _merged(self, method: MergeMethod) -> Made:
        base = None if method == "linear" else self._base()
        folders = self._folders()
        self.folder.mkdir(parents=True, exist_ok=True)
        return self._in_best_template(merge_weights(method, folders, self.folder / method, base=base))

    def _btx(self) -> Made:
        self.folder.mkdir(parents=True, exist_ok=True)
        start = start_btx(self._folders(), self.folder / "btx", seed=self.recipe.seed)
        first = next(iter(self.specialists.values()))
        return self._lone(self._tuned("btx", SpecialistConfig(model=str(start), template=first.template)), "tune-btx")

    def _fusechat(self) -> Made:
        """The first specialist is the pivot; the budget is shared by its pairs with the others."""
        pivot, *others = self.specialists
        stage = self.budget.model_copy(update={"steps": max(1, self.budget.steps // len(others))})
        targets = [self._distilled(pivot, source, stage) for source in others]
        base = self._local(Path(self.specialists[pivot].model))
        merged = merge_weights("sce", targets, self.folder / "sce", base=base)
        phases = (f"fusechat-{source}" for source in others)
        return self._lone(SpecialistConfig(model=str(merged), template=self.specialists[pivot].template), *phases)

    def _distilled(self, pivot: str, source: str, stage: StageConfig) -> Path:
        target = self.trainer.folder / "specialists" / f"fusechat_{source}"
        if not (target / "config.json").is_file():
            parts = {
                target.name: self.specialists[pivot],
                "pivot": self.specialists[pivot],
                "source": self.specialists[source],
            }
            part = self.recipe.model_copy(update={"specialists": parts})
            trio: Any = DistillingTrio.from_recipe(part, tokenizer=self.trainer.tokenizer)
            trio.config.weighting = "uniform"  # nothing is fused here, so there is no gate to train
            trio.to(self.trainer.device)
            self.trainer.run_stage(f"fusechat-{source}", trio, stage, trained=[target.name])
            kept = self.specialists[pivot].model_copy(
                update={"tune": TuneConfig(domains=tuple(self.trainer.data.domains))}
            )
            self.trainer.save_specialist(trio, target, kept)
        return target

    def _weighted(self, weighting: str) -> Made:
        model = self.trainer.build(self.specialists)
        model.config.weighting = weighting
        return self._made(model)

    def _copies(self) -> Made:
        """LlamaFuser (Figure 5): what n times the weights and the same training give without specialists."""
        base = self._base()
        copies = {
            name: source.model_copy(update={"model": str(base), "tune": None})
            for name, source in self.specialists.items()
        }
        model = self.trainer.build(copies)
        self.trainer.run_stage("copies-stage1", model, self.stage1)
        self.trainer.run_stage("copies-stage2", model, self.stage2)
        return self._made(model, "copies-stage1", "copies-stage2")

    def _direct(self) -> Made:
        train = self.recipe.train.model_copy(update={"sampler": "proportional"})
        unbalanced = Trainer(self.recipe.model_copy(update={"train": train}), dataset=self.trainer.dataset)
        model = self.trainer.build(self.specialists)
        unbalanced.run_stage("compare-direct", model, self.budget)
        return self._made(model, "compare-direct")

    def _fused(self, *, last: str) -> Made:
        model = self.trainer.build(self.specialists)
        self.trainer.run_stage("stage1", model, self.stage1)
        if last == "stage1":
            return self._made(model, "stage1")
        self.trainer.run_stage("stage2", model, self.stage2)
        return self._made(model, "stage1", "stage2")

    def _routed(self) -> Made:
        model = self._fused(last="stage2").model
        fused = self._generator(model)
        return Made(RoutedGenerator(fused, digest=f"routed {model_digest(fused)}"), model, ("stage1", "stage2"))

    def _selected_by_reward(self) -> Made:
        assert self.reward_model is not None
        return self._selected(ChooseByScore(RewardModel(self.reward_model)))

    def _selected_by_judge(self) -> Made:
        assert self.ask_judge is not None
        return self._selected(ChooseByJudge(self.ask_judge, seed=self.recipe.seed))

    def _selected(self, chooser: Chooser) -> Made:
        """Every specialist answers alone; together they are the weights that are served, the chooser's not counted."""
        model = self.trainer.build(self.specialists)
        model.config.weighting = "uniform"
        parts = {name: self._specialist(name).generator for name in self.specialists}
        digest = " ".join([type(chooser).__name__, *(model_digest(part) for part in parts.values())])
        return Made(SelectingGenerator(parts, chooser, digest=digest), model, has_distribution=False)

    def train_seconds(self, phases: Sequence[str]) -> float:
        """Seconds of all steps of some phases, whenever they ran."""
        paths = [self.trainer.folder / phase / "metrics.jsonl" for phase in phases]
        return math.fsum(float(line["seconds"]) for path in paths for line in read_metrics(path))
