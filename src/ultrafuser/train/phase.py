"""A phase: one run of the loop on one model, what it trains, and the hash of all that decides its result."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ultrafuser.alignment.encode import EncodedRecord, Encoder
from ultrafuser.config.training import StageConfig, TrainConfig
from ultrafuser.data.records import Record
from ultrafuser.errors import ConfigError, TrainingError, VocabularyError
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.lora import has_adapter, is_adapter
from ultrafuser.train.observers import Observers
from ultrafuser.train.optimizer import is_gate

logger = logging.getLogger(__name__)

# What of TrainConfig changes the numbers, be it by rounding alone.
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
DECISIVE = {"sampler", "precision", "micro_batch_tokens", "loss_chunk"}


@dataclass(frozen=True, slots=True)
class Phase:
    """One run of the loop.

    Attributes:
        name: `tune-<specialist>`, `stage1`, `stage2`.
        model: Trained in place.
        encoder: For the model's templates.
        records: Encoded training records of each domain.
        sources: The same records as conversations, for joining two of them.
        validation: Encoded validation records of each domain.
        stage: Steps, rates and batch.
        train: How the loop runs.
        seed: Of the batches and of any dropout.
        folder: Takes `metrics.jsonl`, `checkpoints/` and `tensorboard/`.
        max_length: Columns of a record made by joining two; None: no limit.
        trained: Specialists that a stage with `train_specialists` trains; None: all.
        observers: Who is told of every step, besides the metrics file.
    """

    name: str
    model: FusedForCausalLM
    encoder: Encoder
    records: Mapping[str, Sequence[EncodedRecord]]
    sources: Mapping[str, Sequence[Record]]
    validation: Mapping[str, Sequence[EncodedRecord]]
    stage: StageConfig
    train: TrainConfig
    seed: int
    folder: Path
    max_length: int | None = None
    trained: frozenset[str] | None = None
    observers: Observers = Observers()  # noqa: RUF009  it cannot be changed


def choose_parameters(
    model: FusedForCausalLM, *, train_specialists: bool, only: Collection[str] | None = None
) -> dict[str, nn.Parameter]:
    """Freeze and unfreeze; returns what is trained, by name. Of the specialists, all or `only` some.

    Of a specialist with an adapter that is the adapter alone. The gate is left out where it decides nothing: beside a
    lone specialist, or under weights that need no training.

    Raises:
        TrainingError: Nothing is left to train.
    """
    gate_decides = len(model.names) > 1 and model.config.weighting == "gate" and model.config.solo is None
    adapted = {name for name, specialist in model.specialists.items() if has_adapter(specialist)}
    trained: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        specialist = name.split(".")[1]
        chosen = train_specialists and (only is None or specialist in only)
        if specialist in adapted or model.config.shared_base:
            chosen = chosen and is_adapter(name)
        parameter.requires_grad_(gate_decides if is_gate(name) else chosen)
        if parameter.requires_grad:
            trained[name] = parameter
    if not trained:
        raise TrainingError("nothing to train: where no gate decides, a stage needs train_specialists: true")
    if rounded := {str(parameter.dtype) for parameter in trained.values()} - {"torch.float32"}:
        logger.warning(
            "training weights kept in %s loses small updates: set dtype: float32 (and train.precision: bf16 for speed)",
            ", ".join(sorted(rounded)),
        )
    return trained


def check_tokens(phase: Phase) -> None:
    """Refuse records with tokens that not every specialist has.

    Raises:
        VocabularyError: Says which token of which record, and what to do.
    """
    size = phase.model.config.vocab_size
    for records in (*phase.records.values(), *phase.validation.values()):
        for record in records:
            highest = max(max(ids, default=-1) for turn in record.turns for ids in (*turn.prompts, turn.response))
            if highest >= size:
                raise VocabularyError(
                    f"{phase.name}: record {record.domain}:{record.id[:12]} has token {highest}, but the specialists "
                    f"share the tokens from 0 to {size - 1}: set tokenizer in the recipe to one of {size} tokens, or "
                    "take the record out"
                )


def hash_records(records: Mapping[str, Sequence[EncodedRecord]]) -> str:
    """Hash of every token of every domain, taken record by record: one text of all would need more memory than they."""
    digest = hashlib.sha256()
    for domain, some in records.items():
        for record in some:
            digest.update(repr((domain, record.id, record.turns)).encode())
    return digest.hexdigest()


def describe_weights(model: FusedForCausalLM, trained: Mapping[str, nn.Parameter]) -> dict[str, int | None]:
    """A line for each parameter (name, whether it is trained, shape) and the sum of its bits.

    The sum is None where another process holds the weights, and only their shape is here.
    """
    described: dict[str, int | None] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            line = f"{name}:{name in trained}:{tuple(parameter.shape)}"
            described[line] = None
            if not parameter.is_meta:
                # Whole numbers, for a sum of floats would depend on the number of threads.
                bits = parameter.detach().contiguous().view(_WHOLE[parameter.element_size()])
                described[line] = int(bits.sum(dtype=torch.int64))
    return described


def join_weights(described: Sequence[Mapping[str, int | None]]) -> dict[str, int]:
    """One description of what all processes have described.

    Raises:
        ConfigError: Two of them have other weights.
    """
    joined: dict[str, int] = {}
    for rank, lines in enumerate(described):
        for line, total in lines.items():
            if total is not None and joined.setdefault(line, total) != total:
                raise ConfigError(
                    f"process {rank} of {len(described)} has other weights of {line.split(':')[0]} than one before it: "
                    "all must read the same models"
                )
    return {line: joined[line] for line in described[0]}


def hash_phase(phase: Phase, weights: Mapping[str, int]) -> str:
    """Hash of all that decides the result: settings, data, templates and the weights at the start of the phase.

    Args:
        phase: The phase.
        weights: As `describe_weights` gives them.
    """
    digest = hashlib.sha256()
    loop = phase.train.model_dump(include=DECISIVE)
    settings = [phase.name, phase.seed, phase.stage.model_dump(mode="json"), loop]
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for template in phase.encoder.templates:
        digest.update(template.source.encode())
    for domain, records in phase.records.items():
        digest.update(domain.encode())
        for record in records:
            digest.update(record.id.encode())
    for line, total in weights.items():
        digest.update(line.encode())
        digest.update(total.to_bytes(8, "big", signed=True))
    return digest.hexdigest()
