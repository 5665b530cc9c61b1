"""From a recipe to a fused model: tune specialists, train the gate, train everything, save (Algorithm 1).

Every phase resumes from its newest checkpoint; what is finished is not done again.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ultrafuser.alignment.encode import EncodedRecord, Encoder
from ultrafuser.config.load import dump_recipe
from ultrafuser.config.recipe import DataConfig, Recipe, SpecialistConfig
from ultrafuser.config.training import StageConfig
from ultrafuser.data.dataset import Dataset, encode_records, load_dataset
from ultrafuser.data.records import Record
from ultrafuser.errors import CheckpointError, ConfigError, DataError, TrainingError
from ultrafuser.files import put_in_place
from ultrafuser.model.adapter_files import absolute, has_adapters
from ultrafuser.model.build import read_templates
from ultrafuser.model.checkpoint import save_fused
from ultrafuser.model.device import choose_device, multiplies_bf16
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.lean import SpecialistLoader, build_lean
from ultrafuser.model.lora import has_adapter, write_adapter
from ultrafuser.model.loss_backends import check_backend
from ultrafuser.model.specialist import load_tokenizer
from ultrafuser.model.target import check_model_target
from ultrafuser.train.adapters import check_adapted_stages, give_adapters
from ultrafuser.train.environment import note_start
from ultrafuser.train.hidden.fill import SpecialistsInMemory
from ultrafuser.train.hidden.loop import CachedLoop
from ultrafuser.train.hidden.store import check_folder
from ultrafuser.train.loop import Loop
from ultrafuser.train.observers import Observers
from ultrafuser.train.parallel.world import read_environment
from ultrafuser.train.phase import DECISIVE, Phase

logger = logging.getLogger(__name__)

SETTINGS = "tuned.json"  # in the folder of a tuned specialist: what it was made with


@dataclass(frozen=True, slots=True)
class EncodedData:
    """The data of a phase as tokens; see `Phase`."""

    encoder: Encoder
    records: Mapping[str, Sequence[EncodedRecord]]
    sources: Mapping[str, Sequence[Record]]
    validation: Mapping[str, Sequence[EncodedRecord]]


class Trainer:
    """Trains what a recipe describes.

    Args:
        recipe: The whole recipe.
        dataset: Its data, when already loaded.
        device: What to compute on; None: the recipe's.
        callbacks: Told of every step, after those of the recipe; see `ultrafuser.train.callbacks`.

    Attributes:
        recipe_file: Where the recipe was read, for `environment.json`; None: nowhere.

    Raises:
        ConfigError: The recipe wants what is not here (data, a device, a tracker, a callback).
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        dataset: Dataset | None = None,
        device: torch.device | None = None,
        callbacks: Sequence[object] = (),
    ) -> None:
        if recipe.data is None:
            raise ConfigError(f"recipe {recipe.name!r} has no data section, so there is nothing to train on")
        self.recipe = recipe
        self.recipe_file: Path | None = None
        self.observers = Observers.of(recipe, callbacks)
        self.data: DataConfig = recipe.data
        self.dataset = dataset if dataset is not None else load_dataset(recipe.data)
        if recipe.train.threads is not None:
            torch.set_num_threads(recipe.train.threads)
        self.device = device if device is not None else choose_device(recipe.train.device, "train.device")
        if recipe.train.precision == "bf16" and not multiplies_bf16(self.device):
            logger.warning(
                "this processor has no instructions for bf16, so train.precision: bf16 is several times as slow as fp32"
            )
        check_backend(recipe.train.loss_backend, self.device, space=recipe.fusion.space)
        check_adapted_stages(recipe)
        first = next(iter(recipe.specialists.values()))
        self.tokenizer: Any = load_tokenizer(SpecialistConfig(model=recipe.tokenizer) if recipe.tokenizer else first)

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self.recipe.folder

    def run(self) -> Path:
        """Do all phases and save the fused model; returns its folder."""
        text = dump_recipe(self.recipe)
        self._begin(text)
        specialists = {name: self.tuned_specialist(name) for name in self.recipe.specialists}
        stages = self._stages()
        gate = None
        if self.recipe.train.stage1_cache.mode != "off" and "stage1" in stages and len(specialists) > 1:
            lean = self.run_stage1_lean(specialists, stages.pop("stage1"))
            if not stages:
                return self._save(lean, text, gate_only=True)
            gate = lean.fusion_gate.state_dict()
            del lean
        model = self.build(specialists)
        if gate is not None:
            model.fusion_gate.load_state_dict(gate)
        for name, stage in stages.items():
            self.run_stage(name, model, stage)
        return self._save(model, text)

    def _begin(self, text: str) -> None:
        """Make the output folder, and keep the recipe there unless one was kept before.

        Raises:
            TrainingError: It cannot be written; before any weights are read.
            ModelError: What stands where the model will be is none.
        """
        check_model_target(self.folder / "model")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
            if not (self.folder / "recipe.yaml").exists():
                (self.folder / "recipe.yaml").write_text(text, encoding="utf-8")
        except OSError as error:
            raise TrainingError(
                f"cannot write to {self.folder}: {error.strerror or error}. Make room, or choose another output"
            ) from error
        note_start(self.folder, recipe_file=self.recipe_file, num_processes=read_environment()[1])

    def _stages(self) -> dict[str, StageConfig]:
        """The stages that have something to do, in order."""
        stages = {"stage1": self.recipe.stage1, "stage2": self.recipe.stage2}
        several = len(self.recipe.specialists) > 1
        return {
            name: stage for name, stage in stages.items() if stage is not None and (several or stage.train_specialists)
        }

    def _save(self, model: FusedForCausalLM, text: str, *, gate_only: bool = False) -> Path:
        # Now that no phase has refused: a recipe that does not fit this folder must not replace the one that does.
        (self.folder / "recipe.yaml").write_text(text, encoding="utf-8")
        # Adapters are small and their specialists are on disk: a copy of these would be most of the folder.
        gate_only = gate_only or has_adapters(model)
        target = save_fused(model, self.folder / "model", tokenizer=self.tokenizer, recipe=text, gate_only=gate_only)
        logger.info("the fused model is in %s", target)
        return target

    def tuned_specialist(self, name: str) -> SpecialistConfig:
        """A specialist as the recipe wants it: as it is, or fine-tuned first and kept in `specialists/<name>`.

        Raises:
            CheckpointError: The specialist kept there was made with other settings.
        """
        source = self.recipe.specialists[name]
        if source.tune is None:
            return source
        target = self.folder / "specialists" / name
        if any((target / file).is_file() for file in ("config.json", "adapter_config.json")):
            self._check_settings(target, source)
        else:
            model = self.build({name: source})
            self.run_stage(f"tune-{name}", model, source.tune, domains=source.tune.domains)
            self.save_specialist(model, target, source)
        return SpecialistConfig(model=str(target), template=source.template)

    def build(self, specialists: Mapping[str, SpecialistConfig]) -> FusedForCausalLM:
        """Fuse specialists, with a new gate, on the recipe's device."""
        part = self.recipe.model_copy(update={"specialists": dict(specialists)})
        model: Any = FusedForCausalLM.from_recipe(part, tokenizer=self.tokenizer)
        model.to(self.device)
        return model  # type: ignore[no-any-return]

    def run_stage1_lean(self, specialists: Mapping[str, SpecialistConfig], stage: StageConfig) -> FusedForCausalLM:
        """Train a new gate with one specialist in memory at a time; returns a model of gate and heads alone.

        Raises:
            TrainingError: The folder of hidden states cannot be written.
        """
        check_folder(self._hidden_folder)
        loader = SpecialistLoader(specialists, dtype=getattr(torch, self.recipe.dtype), device=self.device)
        lean: Any = build_lean(FusedForCausalLM, self.recipe, loader, tokenizer=self.tokenizer)
        lean.to(self.device)
        if self.recipe.train.precision == "bf16":
            lean.specialists.to(torch.bfloat16)  # as autocast would in every step: heads are all that is left of them
        self.run_stage("stage1", lean, stage, loader=loader)
        return lean  # type: ignore[no-any-return]

    @property
    def _hidden_folder(self) -> Path:
        return self.recipe.train.stage1_cache.folder or self.folder / "hidden"

    def run_stage(
        self,
        name: str,
        model: FusedForCausalLM,
        stage: StageConfig,
        *,
        domains: Sequence[str] | None = None,
        trained: Sequence[str] | None = None,
        loader: SpecialistLoader | None = None,
    ) -> None:
        """Train a model in place on some of the domains; of its specialists, train some (None: all).

        With `train.stage1_cache` a stage of the gate alone runs on hidden states from disk; specialists that are not in
        the model are taken from the `loader`.
        """
        if stage.lora is not None:
            give_adapters(model, stage.lora, seed=self.recipe.seed, only=trained)
        encoder = Encoder(self.tokenizer, read_templates(model.config))
        phase = self._phase(name, model, stage, self._encode_domains(encoder, domains), trained=trained)
        cache = self.recipe.train.stage1_cache
        if cache.mode == "off" or stage.train_specialists:
            Loop(phase).run()
        else:
            CachedLoop(phase, loader or SpecialistsInMemory(model), cache, self._hidden_folder).run()

    def _encode_domains(self, encoder: Encoder, domains: Sequence[str] | None) -> EncodedData:
        """The records of some of the domains (None: all) as tokens.

        Raises:
            DataError: A domain has none that fit.
        """
        wanted = list(domains or self.data.domains)
        encoded = {domain: self._encode(encoder, self.dataset["train"][domain]) for domain in wanted}
        if empty := [domain for domain, records in encoded.items() if not records]:
            raise DataError(f"every record of {', '.join(empty)} is longer than max_length {self.data.max_length}")
        by_id = {domain: {record.id: record for record in self.dataset["train"][domain]} for domain in wanted}
        num_validation = self.recipe.train.validation_records
        return EncodedData(
            encoder=encoder,
            records=encoded,
            sources={domain: [by_id[domain][record.id] for record in encoded[domain]] for domain in wanted},
            validation={
                domain: self._encode(encoder, self.dataset["validation"][domain][:num_validation])
                for domain in self.data.domains
            },
        )

    def _phase(
        self,
        name: str,
        model: FusedForCausalLM,
        stage: StageConfig,
        data: EncodedData,
        *,
        trained: Sequence[str] | None = None,
    ) -> Phase:
        return Phase(
            name=name,
            model=model,
            encoder=data.encoder,
            records=data.records,
            sources=data.sources,
            validation=data.validation,
            stage=stage,
            train=self.recipe.train,
            seed=self.recipe.seed,
            folder=self.folder / name,
            max_length=self.data.max_length,
            trained=frozenset(trained) if trained is not None else None,
            observers=self.observers,
        )

    def _encode(self, encoder: Encoder, records: Sequence[Record]) -> list[EncodedRecord]:
        return encode_records(
            records, encoder, max_length=self.data.max_length, overlength=self.data.overlength, turns=self.data.turns
        )

    def save_specialist(self, model: FusedForCausalLM, target: Path, source: SpecialistConfig) -> None:
        """A plain model folder with the settings it was made with: written beside its place, renamed when whole.

        One that was tuned as an adapter is a peft folder that names its base.
        Its tokenizer carries the template it was tuned in, which need not be that of the shared tokenizer.
        """
        partial = target.with_name(f".{target.name}.partial")
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.chat_template = read_templates(model.config)[0].source
        specialist: Any = model.specialists[target.name]
        try:
            shutil.rmtree(partial, ignore_errors=True)
            if has_adapter(specialist):
                part = model.config.sources[0]
                write_adapter(specialist, partial, base=absolute(part["model"]), revision=part["revision"])
            else:
                specialist.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            (partial / SETTINGS).write_text(json.dumps(self._settings(source), indent=1), encoding="utf-8")
            put_in_place(partial, target)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise CheckpointError(
                f"cannot write the specialist to {target}: {reason}. Make room and start again"
            ) from error

    def _check_settings(self, target: Path, source: SpecialistConfig) -> None:
        if not (target / SETTINGS).is_file():
            return
        made, wanted = json.loads((target / SETTINGS).read_text(encoding="utf-8")), self._settings(source)
        if changed := [key for key in wanted if made.get(key) != wanted[key]]:
            values = ", ".join(f"{key} {made.get(key)!r}, not {wanted[key]!r}" for key in changed)
            raise CheckpointError(
                f"{target} was made with other settings ({values}): choose another output folder, or delete {target} "
                f"and {self.folder / f'tune-{target.name}'} to tune it anew"
            )

    def _settings(self, source: SpecialistConfig) -> dict[str, Any]:
        """What decides a tuned specialist, as flat plain values; no paths, since folders may be moved."""
        assert source.tune is not None
        cut = {"validation_fraction", "test_fraction", "max_length", "overlength", "turns"}
        return {
            **source.tune.model_dump(mode="json"),
            **self.recipe.train.model_dump(include=DECISIVE),
            **self.data.model_dump(include=cut),
            "seed": self.recipe.seed,
            "dtype": self.recipe.dtype,
            "template": Path(source.template).name,
        }
