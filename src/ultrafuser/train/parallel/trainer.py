"""From a recipe to a fused model in several processes (Algorithm 1).

A phase leaves its model in parts, so the next one begins with the specialists as they are on disk and what the phases
before have trained, read from their last checkpoints; the model that is saved in the end is made in the same way, by
the first process alone. Of the processes of a machine one at a time holds a model whole.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ultrafuser.alignment.encode import Encoder
from ultrafuser.chat.template import Template
from ultrafuser.config.load import dump_recipe
from ultrafuser.config.recipe import Recipe, SpecialistConfig
from ultrafuser.config.training import StageConfig
from ultrafuser.data.dataset import Dataset
from ultrafuser.errors import CheckpointError, ConfigError, ModelError, TrainingError
from ultrafuser.model.build import resolve_templates
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.fused_rank import build_part
from ultrafuser.model.specialist import load_tokenizer
from ultrafuser.train.adapters import give_adapters, refuse_several_processes
from ultrafuser.train.checkpoint import find_newest, read_parameters, read_state
from ultrafuser.train.loop import Loop
from ultrafuser.train.parallel.fsdp import FullyShard
from ultrafuser.train.parallel.specialist import SpecialistParallel
from ultrafuser.train.parallel.strategy import Strategy
from ultrafuser.train.parallel.world import World
from ultrafuser.train.phase import hash_records
from ultrafuser.train.trainer import Trainer


class ParallelTrainer(Trainer):
    """Trains what a recipe describes, as one of several processes that all do the same.

    Args:
        recipe: The whole recipe.
        world: The processes.
        dataset: Its data, when already loaded.
        callbacks: See `Trainer`; the first process calls them.

    Raises:
        ConfigError: The recipe wants something that several processes cannot do.
    """

    def __init__(
        self, recipe: Recipe, world: World, *, dataset: Dataset | None = None, callbacks: Sequence[object] = ()
    ) -> None:
        if recipe.train.stage1_cache.mode != "off":
            raise ConfigError(
                f"train.stage1_cache.mode: {recipe.train.stage1_cache.mode} is for one process, and there are "
                f"{world.size}: set it to off, or train stage 1 in one process"
            )
        refuse_several_processes(recipe, num_processes=world.size)
        super().__init__(recipe, dataset=dataset, device=world.device, callbacks=callbacks)
        self.world = world

    def run(self) -> Path:
        """Do all phases and save the fused model; returns its folder."""
        text = dump_recipe(self.recipe)
        self.world.agree("recipe", text)
        self._share_folder(text)
        specialists = {name: self.tuned_specialist(name) for name in self.recipe.specialists}
        stages = self._stages()
        done: dict[str, StageConfig] = {}
        for name, stage in stages.items():
            self._run_phase(name, specialists, stage, after=done)
            done[name] = stage
        with self.world.together():
            if self.world.is_main:
                self._save(self._build_after(specialists, done), text)
        return self.folder / "model"

    def tuned_specialist(self, name: str) -> SpecialistConfig:
        """A specialist as the recipe wants it; see `Trainer.tuned_specialist`."""
        source = self.recipe.specialists[name]
        if source.tune is None:
            return source
        target = self.folder / "specialists" / name
        with self.world.together():
            is_there = any((target / file).is_file() for file in ("config.json", "adapter_config.json"))
            if is_there:
                self._check_settings(target, source)
        if not self.world.gather(is_there)[0]:
            phase = f"tune-{name}"
            self._run_phase(phase, {name: source}, source.tune, domains=source.tune.domains)
            with self.world.together():
                if self.world.is_main:
                    self.save_specialist(self._build_after({name: source}, {phase: source.tune}), target, source)
        return SpecialistConfig(model=str(target), template=source.template)

    def build(
        self, specialists: Mapping[str, SpecialistConfig], loads: Sequence[str] | None = None
    ) -> FusedForCausalLM:
        """Fuse specialists, with a new gate, in this machine's memory: not yet on a device.

        Args:
            specialists: By name, in order.
            loads: Those whose weights are wanted; None: all.
        """
        part = self.recipe.model_copy(update={"specialists": dict(specialists)})
        if loads is None or set(loads) == set(specialists):
            model: FusedForCausalLM = FusedForCausalLM.from_recipe(part, tokenizer=self.tokenizer)
            return model
        return build_part(part, loads, tokenizer=self.tokenizer)

    def _run_phase(
        self,
        name: str,
        specialists: Mapping[str, SpecialistConfig],
        stage: StageConfig,
        *,
        domains: Sequence[str] | None = None,
        after: Mapping[str, StageConfig] | None = None,
    ) -> None:
        """Train all specialists and gate as a stage wants it, from where the phases before have left them."""
        with self.world.together():
            data = self._encode_domains(Encoder(self.tokenizer, self._templates(specialists)), domains)
        self.world.agree("data", hash_records(data.records))
        strategy = self.strategy(list(specialists))
        with self.world.in_turn():
            model = self._build_after(specialists, after or {}, strategy.loads(list(specialists)))
            if stage.lora is not None:
                give_adapters(model, stage.lora, seed=self.recipe.seed)
            loop = Loop(self._phase(name, model, stage, data), strategy)
        loop.run()

    def strategy(self, names: Sequence[str]) -> Strategy:
        """How the processes share a model of these specialists."""
        train = self.recipe.train
        bf16 = train.precision == "bf16"
        if train.parallel.mode == "specialist" and len(names) > 1:
            return SpecialistParallel(self.world, train.parallel, num_specialists=len(names), bf16=bf16)
        return FullyShard(self.world, train.parallel, bf16=bf16)

    def _build_after(
        self,
        specialists: Mapping[str, SpecialistConfig],
        phases: Mapping[str, StageConfig],
        loads: Sequence[str] | None = None,
    ) -> FusedForCausalLM:
        """A model as these phases have left it: whole, or with the weights of some specialists alone.

        Raises:
            CheckpointError: The last checkpoint of a phase is gone or damaged.
        """
        model = self.build(specialists, loads)
        for name, stage in phases.items():
            if stage.lora is not None:
                give_adapters(model, stage.lora, seed=self.recipe.seed)
            path = find_newest(self.folder / name / "checkpoints")
            if path is None or read_state(path)["step"] != stage.steps:
                raise CheckpointError(
                    f"the last checkpoint of {name} is gone or damaged ({self.folder / name}): start again, and the "
                    "phase is finished once more"
                )
            parameters = dict(model.named_parameters())
            with torch.no_grad():
                for key, value in read_parameters(path).items():
                    parameters[key].copy_(value)
        return model

    def _templates(self, specialists: Mapping[str, SpecialistConfig]) -> list[Template]:
        """The templates that a model of these specialists will have; needs no weights."""
        tokenizers: dict[str, Any] = {}
        for name, source in specialists.items():
            try:
                tokenizers[name] = load_tokenizer(source, name=name)
            except ModelError:  # it has none of its own; building the model says so
                continue
        wanted = {name: source.template for name, source in specialists.items()}
        return resolve_templates(wanted, list(specialists), self.tokenizer, tokenizers)

    def _share_folder(self, text: str) -> None:
        """Begin the output folder, and make sure that all processes write to the same one.

        Raises:
            TrainingError: It cannot be written, or some process does not see it; before any weights are read.
        """
        probe = self.folder / f".probe-{self.world.gather(os.getpid())[0]}"
        with self.world.together():
            if self.world.is_main:
                self._begin(text)
                probe.touch()
        try:
            with self.world.together():
                if not probe.exists():
                    raise TrainingError(
                        f"{self.folder} on {socket.gethostname()} is not the folder that the first process writes to: "
                        "all need one, on a shared file system"
                    )
        finally:
            if self.world.is_main:
                probe.unlink(missing_ok=True)
