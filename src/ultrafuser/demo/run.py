"""The demo from end to end: world, base, specialists, fusion, baselines, exam, report.

Every trained part resumes from its checkpoint, so an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from ultrafuser.analysis.report import write_report
from ultrafuser.analysis.results import CurvePoint, Heatmap, HeatmapRow, Results, write_results
from ultrafuser.analysis.summary import headline
from ultrafuser.analysis.terminal import scores_table
from ultrafuser.baselines.average import average_weights
from ultrafuser.config.load import dump_recipe
from ultrafuser.config.recipe import Recipe, SpecialistConfig
from ultrafuser.demo.exam import Grade, make_exam, take_exam
from ultrafuser.demo.ingredients import train_tokenizer, untrained_model, write_training_files
from ultrafuser.demo.recipe import BASE, DOMAINS, FURTHER, ITEMS_PER_DOMAIN, TEMPLATES, TEST_ITEMS, demo_recipe, tuned
from ultrafuser.demo.world import Split, make_items
from ultrafuser.errors import ConfigError
from ultrafuser.evaluation.losses import score_losses
from ultrafuser.model.checkpoint import save_fused
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.generator import FusedGenerator
from ultrafuser.model.specialist import load_specialist
from ultrafuser.model.target import check_model_target
from ultrafuser.provenance import hardware, versions
from ultrafuser.train.tracking.metrics import read_metrics
from ultrafuser.train.trainer import Trainer

SHOWN_SAMPLES = 40  # rows of the heatmap per domain
# What a run may leave in its folder, from the first minute ("untrained") on; phases come on top.
OWN = {
    "untrained",
    "data",
    "tune-base",
    "specialists",
    "model",
    "recipe.yaml",
    "results.json",
    "report.html",
    "inspection",
}
CURVE_PHASES = ("tune-text", "tune-code", "tune-math", "tune-further", "direct", "stage1", "stage2")


def run_demo(
    folder: Path, *, seed: int = 0, fresh: bool = False, composed_share: float | None = None, split: Split = "test"
) -> Results:
    """Run the whole demo and write `results.json`, `report.html` and the fused model to `folder`.

    Args:
        folder: Where everything goes.
        seed: Of the world, the models and the batches.
        fresh: Delete an earlier run first.
        composed_share: Part of each fusion batch that joins two domains; None: the demo's own.
        split: Of the questions it is examined on; settings are to be chosen on "validation".

    Raises:
        ConfigError: `fresh`, and the folder holds what no demo wrote.
        ModelError: What stands where the model will be is none.
    """
    if fresh and folder.exists():
        check_own(folder)
        shutil.rmtree(folder)
    check_model_target(folder / "model")
    transformers_logging.disable_progress_bar()  # its models load in milliseconds: the bars would hide ours
    return Demo(folder, seed=seed, composed_share=composed_share, split=split).run()


def check_own(folder: Path) -> None:
    """Refuse a folder that holds anything but a demo.

    Raises:
        ConfigError: Names what a fresh run would delete with it.
    """
    names = [path.name for path in sorted(folder.iterdir())] if folder.is_dir() else []
    strange = [name for name in names if name not in {*OWN, *CURVE_PHASES}]
    if strange or "untrained" not in names:
        what = f"{strange[0]}, which no demo wrote" if strange else "no demo"
        raise ConfigError(f"{folder} holds {what}, so --fresh does not delete it: give another --folder")


class Demo:
    """One run of the demo; see `run_demo`."""

    def __init__(self, folder: Path, *, seed: int, composed_share: float | None, split: Split) -> None:
        self.folder, self.seed = folder, seed
        self.console = Console(stderr=True, highlight=False)
        self.timings: dict[str, float] = {}
        self.grades: dict[str, Grade] = {}
        self.began = time.perf_counter()
        with self._timed("world and base model"):
            self.recipe = self._make_ingredients(composed_share)
        self.trainer = Trainer(self.recipe)
        self.exam = make_exam(DOMAINS, items_per_domain=TEST_ITEMS, seed=seed, split=split)
        self.split = split

    def run(self) -> Results:
        """Train, examine, report."""
        specialists: dict[str, SpecialistConfig] = {}
        for name in TEMPLATES:
            with self._timed(f"specialist {name}"):
                specialists[name] = self.trainer.tuned_specialist(name)
            self._examine(f"specialist:{name}", partial(self.trainer.build, {name: specialists[name]}))
        self._examine("average", lambda: self._average(specialists))
        self._examine("uniform", lambda: self._uniform(specialists))
        with self._timed("further tuning"):
            further = self._further_tuned(specialists["text"])
        self._examine("further-tuned", lambda: self.trainer.build({"text": further}))
        stage1, stage2 = self.recipe.stage1, self.recipe.stage2
        assert stage1 is not None
        assert stage2 is not None
        with self._timed("direct training"):
            direct = self.trainer.build(specialists)
            self.trainer.run_stage("direct", direct, stage2.model_copy(update={"gate_entropy": 0.0}))
        self._examine("direct", lambda: direct)
        model = self.trainer.build(specialists)
        with self._timed("stage 1"):
            self.trainer.run_stage("stage1", model, stage1)
        self._examine("fused:stage1", lambda: model)
        with self._timed("stage 2"):
            self.trainer.run_stage("stage2", model, stage2)
        self._examine("fused:stage2", lambda: model)
        results = self._results()
        self._write(model, results)
        return results

    def _make_ingredients(self, composed_share: float | None) -> Recipe:
        """Training files, tokenizer, and a base model trained a little on everything."""
        items = {domain: make_items(domain, "train", ITEMS_PER_DOMAIN, self.seed) for domain in DOMAINS}
        files = write_training_files(items, self.folder / "data")
        start = self.folder / "untrained"
        tokenizer = train_tokenizer(items, TEMPLATES.values())
        untrained_model(tokenizer, self.seed).save_pretrained(start)
        tokenizer.save_pretrained(start)
        base = self.folder / "specialists" / "base"
        recipe = demo_recipe(self.folder, base, files, self.seed, composed_share=composed_share)
        self.console.print("[bold]base model[/bold]: a little of everything")
        part = {"base": tuned(start, "plain", BASE)}
        Trainer(recipe.model_copy(update={"specialists": part})).tuned_specialist("base")
        return recipe

    def _average(self, specialists: dict[str, SpecialistConfig]) -> FusedForCausalLM:
        """Weights averaged, in the template that suits the average best on validation data."""
        merged = average_weights([load_specialist(source, name=name) for name, source in specialists.items()])
        choices = [
            FusedForCausalLM.from_specialists({"average": merged}, templates=template, tokenizer=self.trainer.tokenizer)
            for template in TEMPLATES.values()
        ]
        held_out = [r.messages for records in self.trainer.dataset["validation"].values() for r in records]
        return min(
            choices, key=lambda model: score_losses(FusedGenerator(model, self.trainer.tokenizer), held_out).loss.value
        )

    def _uniform(self, specialists: dict[str, SpecialistConfig]) -> FusedForCausalLM:
        model = self.trainer.build(specialists)
        model.config.weighting = "uniform"
        return model

    def _further_tuned(self, text: SpecialistConfig) -> SpecialistConfig:
        """The text specialist trained on everything, composed records and all, as long as both stages together."""
        stage2 = self.recipe.stage2
        assert stage2 is not None
        stage = FURTHER.model_copy(update={"composed_share": stage2.composed_share})
        part = {"further": tuned(Path(text.model), text.template, stage)}
        return Trainer(
            self.recipe.model_copy(update={"specialists": part}), dataset=self.trainer.dataset
        ).tuned_specialist("further")

    def _examine(self, name: str, make: Callable[[], FusedForCausalLM]) -> None:
        with self._timed(f"exam {name}"):
            self.grades[name] = take_exam(name, FusedGenerator(make(), self.trainer.tokenizer), self.exam)
        shown = "  ".join(
            f"{domain} {score.loss:.3f} {100 * (score.accuracy or 0):.0f}%"
            for domain, score in self.grades[name].scores.items()
        )
        self.console.print(f"[bold]{name:<16}[/bold] {shown}")

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.timings[what] = time.perf_counter() - began

    def _results(self) -> Results:
        fused = self.grades["fused:stage2"]
        rows: list[HeatmapRow] = []
        for domain in self.exam:
            rows += [row for row in fused.samples if row.domain == domain][:SHOWN_SAMPLES]
        return Results(
            name="demo",
            seconds=time.perf_counter() - self.began,
            seed=self.seed,
            recipe=self.recipe.model_dump(mode="json"),
            versions=versions(),
            hardware=hardware(),
            scores={name: grade.scores for name, grade in self.grades.items()},
            gate_weights={name: grade.gate_weights for name, grade in self.grades.items() if grade.gate_weights},
            heatmap=Heatmap(specialists=list(TEMPLATES), rows=rows),
            answers=fused.answers,
            curves={phase: self._curve(phase) for phase in CURVE_PHASES},
            timings=self.timings,
            notes=[
                f"Questions of the {self.split} split, disjoint from training; mixed ones are composed in ways that"
                " training never shows.",
                "further-tuned: the text specialist trained on the same records as the fusion, as many steps as both"
                " stages together.",
                "direct: everything trained at once from an untrained gate, as long as stage 2, without stage 1 and"
                " without the gate regulariser.",
            ],
        )

    def _curve(self, phase: str) -> list[CurvePoint]:
        path = self.folder / phase / "metrics.jsonl"
        return [CurvePoint(step=line["step"], loss=line["loss_per_domain"]) for line in read_metrics(path)]

    def _write(self, model: FusedForCausalLM, results: Results) -> None:
        recipe = dump_recipe(self.recipe)
        (self.folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
        scores = json.loads(results.model_dump_json())["scores"]
        target = save_fused(
            model, self.folder / "model", tokenizer=self.trainer.tokenizer, recipe=recipe, results=scores
        )
        write_results(results, self.folder / "results.json")
        write_report(results, self.folder / "report.html")
        out = Console(highlight=False)
        out.print(scores_table(results))
        for line in headline(results):
            out.print(line)
        out.print(
            f"\n{results.seconds:.0f} s on {torch.get_num_threads()} threads. Report: {self.folder / 'report.html'}"
        )
        out.print(f"Talk to it:  ultrafuser chat {target} --single-turn   (it has learnt single questions only)")
