"""Encoded records to the tensors of one batch: prompts left-padded turn by turn, responses aligned.

Shapes: B rows, N specialists, T columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from ultrafuser.alignment.encode import EncodedRecord, Ids

IGNORED = -100  # label of a column that is not trained


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of some records; `labels` are shared, since responses align.

    Attributes:
        specialist_input_ids: Each specialist's view.
        specialist_attention_mask: 1 where that specialist sees the column.
        labels: Response tokens where they stand, -100 elsewhere.
        rows: The records, in row order.
    """

    specialist_input_ids: Int[Tensor, "B N T"]
    specialist_attention_mask: Int[Tensor, "B N T"]
    labels: Int[Tensor, "B T"]
    rows: tuple[EncodedRecord, ...]

    @property
    def num_response_tokens(self) -> int:
        """Tokens that count in the loss."""
        return sum(record.num_response_tokens for record in self.rows)

    def tensors(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Arguments of `response_nll` and of `forward`."""
        return {
            "specialist_input_ids": self.specialist_input_ids.to(device),
            "specialist_attention_mask": self.specialist_attention_mask.to(device),
            "labels": self.labels.to(device),
        }


def collate(records: Sequence[EncodedRecord], *, pad_id: int) -> Batch:
    """Lay records out in columns.

    A turn takes as many prompt columns as its longest piece, shorter pieces padded on the left, then its response.
    Rows are padded on the right. What a specialist must not see has mask 0 wherever it stands.

    Source: Ding et al. 2024 (arXiv 2403.08281), Section 3.1; several turns in one row are ours.
    """
    num_specialists = len(records[0].turns[0].prompts)
    width = max(record.num_columns for record in records)
    ids = torch.full((len(records), num_specialists, width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full((len(records), width), IGNORED, dtype=torch.long)
    for b, record in enumerate(records):
        column = 0
        for turn in record.turns:
            start = column + max(len(prompt) for prompt in turn.prompts)
            stop = start + len(turn.response)
            response = torch.tensor(turn.response)
            labels[b, start:stop] = response
            ids[b, :, start:stop] = response
            mask[b, :, start:stop] = 1
            for n, prompt in enumerate(turn.prompts):
                ids[b, n, start - len(prompt) : start] = torch.tensor(prompt, dtype=torch.long)
                mask[b, n, start - len(prompt) : start] = 1
                if turn.hides_end[n]:
                    mask[b, n, stop - 1] = 0
            column = stop
    return Batch(ids, mask, labels, tuple(records))


def left_pad(prompts: Sequence[Sequence[Ids]], *, pad_id: int) -> dict[str, Tensor]:
    """Stack prompts of several conversations, all ending in the same column: inputs of `generate()`.

    Args:
        prompts: For each conversation one row of ids per specialist.
        pad_id: Fills the left of the shorter rows.

    Returns:
        `input_ids` and `attention_mask` [B, T] (the first specialist's view) and `specialist_input_ids` and
        `specialist_attention_mask` [B, N, T].
    """
    width = max(len(row) for rows in prompts for row in rows)
    ids = torch.full((len(prompts), len(prompts[0]), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, rows in enumerate(prompts):
        for n, row in enumerate(rows):
            ids[b, n, width - len(row) :] = torch.tensor(row, dtype=torch.long)
            mask[b, n, width - len(row) :] = 1
    return {
        "input_ids": ids[:, 0].contiguous(),
        "attention_mask": mask[:, 0].contiguous(),
        "specialist_input_ids": ids,
        "specialist_attention_mask": mask,
    }


def micro_batches(records: Sequence[EncodedRecord], *, max_columns: int) -> Iterator[list[EncodedRecord]]:
    """Cut a batch into pieces of at most `max_columns` rows x columns, shortest records first for little padding.

    The pieces are a pure function of the records: how they are cut changes nothing but rounding.
    """
    piece: list[EncodedRecord] = []
    for record in sorted(records, key=lambda record: (record.num_columns, record.id)):
        if piece and record.num_columns * (len(piece) + 1) > max_columns:
            yield piece
            piece = []
        piece.append(record)
    if piece:
        yield piece


@dataclass(frozen=True, slots=True)
class Collator:
    """Encoded records to arguments of `FusedForCausalLM.forward`: the `data_collator` of `transformers.Trainer`.

    Attributes:
        pad_id: Of the tokenizer.
    """

    pad_id: int

    def __call__(self, records: Sequence[EncodedRecord]) -> dict[str, Tensor]:
        """Tensors of one batch; see `Batch`."""
        return collate(records, pad_id=self.pad_id).tensors()
