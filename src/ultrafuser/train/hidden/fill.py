"""Specialists one at a time: load, run over the records of windows, write last hidden states, free."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Shaped
from torch import Tensor
from transformers import PreTrainedModel

from ultrafuser.alignment.collate import collate, micro_batches
from ultrafuser.alignment.encode import EncodedRecord
from ultrafuser.errors import TrainingError
from ultrafuser.model.backbone import last_hidden_state
from ultrafuser.model.columns import response_columns, visible_positions
from ultrafuser.model.fused import FusedForCausalLM
from ultrafuser.model.lean import SpecialistFacts, describe_specialist
from ultrafuser.train.hidden.file import HiddenWriter
from ultrafuser.train.hidden.plan import Window
from ultrafuser.train.hidden.store import HiddenStore


class Specialists(Protocol):
    """Where specialists come from, one at a time."""

    @property
    def facts(self) -> Mapping[str, SpecialistFacts]:
        """What is known of each, in order."""
        ...

    def load(self, name: str) -> PreTrainedModel:
        """One specialist, ready to run."""
        ...

    def release(self, specialist: PreTrainedModel) -> None:
        """It is not needed for now."""
        ...


class SpecialistsInMemory:
    """The specialists of a model that holds them all; saves forward passes, not memory."""

    def __init__(self, model: FusedForCausalLM) -> None:
        self.model = model
        self.facts = {name: describe_specialist(self._get(name)) for name in model.names}

    def load(self, name: str) -> PreTrainedModel:
        """The specialist as it is."""
        self._get(name).eval()
        return self._get(name)

    def release(self, specialist: PreTrainedModel) -> None:
        """Stays in memory."""
        specialist.train(self.model.training)

    def _get(self, name: str) -> PreTrainedModel:
        specialist: PreTrainedModel = self.model.specialists[name]
        return specialist


def fill(
    store: HiddenStore,
    missing: Mapping[str, Sequence[Window]],
    specialists: Specialists,
    *,
    pad_id: int,
    max_columns: int,
    bf16: bool,
    report: Callable[[str], None],
) -> None:
    """Make the files that are missing, one specialist after another.

    Args:
        store: Takes them.
        missing: Windows by specialist.
        specialists: Loads each that is needed, once.
        pad_id: Fills padding.
        max_columns: Columns of a forward pass.
        bf16: Run under autocast.
        report: Told of each file.

    Raises:
        TrainingError: The disk is full or refuses; files that are whole stay.
    """
    for name, windows in missing.items():
        if not windows:
            continue
        specialist = specialists.load(name)
        try:
            for window in windows:
                began, path = time.monotonic(), store.path(name, window)
                try:
                    writer = HiddenWriter(path, num_rows=window.num_tokens, metadata=store.metadata(name, window))
                    with writer:
                        for piece in micro_batches(store.views(name, window), max_columns=max_columns):
                            writer.append(run_specialist(specialist, piece, pad_id=pad_id, bf16=bf16))
                except OSError as error:
                    raise _refused(path, error) from error
                seconds = time.monotonic() - began
                report(f"hidden states of {name}, {window.label}: {window.num_tokens} tokens in {seconds:.1f} s")
        finally:
            specialists.release(specialist)
            del specialist


@torch.no_grad()
def run_specialist(
    specialist: PreTrainedModel, records: Sequence[EncodedRecord], *, pad_id: int, bf16: bool
) -> Shaped[Tensor, "R H"]:
    """Last hidden states at the columns that predict the R response tokens of some records, in their order.

    Args:
        specialist: In evaluation mode.
        records: As this specialist reads them (`view_of`).
        pad_id: Fills padding.
        bf16: Run under autocast.
    """
    batch, device = collate(records, pad_id=pad_id), specialist.device
    ids, mask = batch.specialist_input_ids[:, 0].to(device), batch.specialist_attention_mask[:, 0].to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        hidden = last_hidden_state(specialist, ids, attention_mask=mask, position_ids=visible_positions(mask, ids, 0))
    predicting, _ = response_columns(batch.labels.to(device))
    return hidden[predicting]


def _refused(path: Path, error: OSError) -> TrainingError:
    return TrainingError(
        f"cannot write hidden states to {path.parent}: {error.strerror or error}. Make room, or set a smaller "
        "train.stage1_cache.disk_gb, and start again: whole files are kept"
    )
