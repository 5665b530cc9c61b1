"""A step of the engine, cut into what each specialist reads of it: own prompts, without a hole in any batch.

While a specialist's prompt has not begun (the engine counts by the longest), its rows are left out, and so are
requests of which nothing is left. Attention then gets an ordinary batch for each specialist; no kernel needs to
know of rows without keys.

Shapes: S rows of the table, R requests of a step, T its tokens, N specialists, L columns of stored prompts,
R_i and T_i what one specialist reads, K blocks a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from ultrafuser.vllm_plugin.positions import own_ids, own_positions, own_slots
from ultrafuser.vllm_plugin.requests import Prompts

Numbers = NDArray[np.int64]


class PromptTable:
    """Prompts of the engine's requests, a row each, and one more row for requests that bring none.

    Args:
        num_rows: Requests that the engine holds.
        num_specialists: That run.
        device: Of the model.
    """

    def __init__(self, num_rows: int, num_specialists: int, device: torch.device) -> None:
        self.nobody = num_rows
        self.lengths: Numbers = np.zeros((num_rows + 1, num_specialists), dtype=np.int64)  # 0: reads the engine's ids
        self.ids = torch.zeros((num_rows + 1, num_specialists, 1), dtype=torch.int32, device=device)

    def put(self, row: int, prompts: Prompts | None) -> None:
        """Store a request's prompts; None: all specialists read the engine's."""
        self.lengths[row] = 0
        if prompts is None:
            return
        longest = max(map(len, prompts))
        if longest > self.ids.shape[-1]:
            wider = self.ids.new_zeros((*self.ids.shape[:2], 1 << (longest - 1).bit_length()))
            wider[..., : self.ids.shape[-1]] = self.ids
            self.ids = wider
        rows = torch.zeros((len(prompts), longest), dtype=torch.int32)
        for n, prompt in enumerate(prompts):
            rows[n, : len(prompt)] = torch.tensor(prompt, dtype=torch.int32)
        self.ids[row, :, :longest] = rows.to(self.ids.device)
        self.lengths[row] = [len(prompt) for prompt in prompts]

    def has_own(self, rows: Numbers) -> bool:
        """Whether any of these requests brings prompts."""
        return bool(self.lengths[rows].any())


@dataclass(frozen=True)
class Step:
    """What the engine runs in one step.

    Attributes:
        table_rows: Of each request, its row in the table, [R].
        scheduled: Tokens of each request in this step, [R].
        computed: Tokens of each request before it, [R]; exact while a prompt is being read.
        input_ids: T of them, or more where the engine pads.
        positions: As the engine counts.
    """

    table_rows: Numbers
    scheduled: Numbers
    computed: Numbers
    input_ids: Int[Tensor, " padded"]
    positions: Int[Tensor, " padded"]


@dataclass(frozen=True)
class Share:
    """What one specialist reads of a step.

    Attributes:
        requests: Those of which it reads something, by their number in the step, [R_i].
        behind: Tokens by which each of them is shorter for it than for the engine, [R_i].
        starts: Where each of them begins among its tokens, and their number, [R_i + 1].
        request_of: Of every token, its request's number in the step, [T_i].
        place: Of every token of the engine, where it is among its own; 0 where it reads nothing.
    """

    requests: Numbers
    behind: Numbers
    starts: Numbers
    request_of: Int[Tensor, " own"]
    input_ids: Int[Tensor, " own"]
    positions: Int[Tensor, " own"]
    place: Int[Tensor, " padded"]

    @property
    def num_tokens(self) -> int:
        """T_i."""
        return int(self.starts[-1])

    @property
    def longest_query(self) -> int:
        """Most tokens of one request."""
        return int(np.diff(self.starts).max(initial=0))

    def slots(self, block_table: Int[Tensor, "R K"], block_size: int) -> Int[Tensor, " own"]:
        """Where in the cache its keys of this step are written."""
        return own_slots(self.positions[None], self.request_of, block_table, block_size)[0].long()

    def spread(self, hidden: Tensor) -> Tensor:
        """Its hidden states [T_i, H], a row for each of the engine's; what it does not read is somebody's, and unused.

        The last token of a prompt is read by all, and no token before it is asked for its logits.
        """
        return hidden[self.place]


def share_step(table: PromptTable, step: Step) -> list[Share]:
    """A step as each specialist reads it, in order."""
    device = step.input_ids.device
    num_tokens = int(step.scheduled.sum())
    request_of: Numbers = np.repeat(np.arange(len(step.scheduled)), step.scheduled)
    table_row_of = torch.from_numpy(step.table_rows[request_of]).to(device)
    lengths = torch.from_numpy(table.lengths).to(device)
    own = own_positions(step.positions[:num_tokens], table_row_of, lengths)
    ids = own_ids(step.input_ids[:num_tokens], own, table_row_of, table.ids, lengths)
    mine = table.lengths[step.table_rows]
    behind = mine.max(axis=1, keepdims=True) - mine  # [R, N]
    reads = np.clip(step.computed[:, None] + step.scheduled[:, None] - behind, 0, step.scheduled[:, None])
    shares = []
    for n in range(mine.shape[1]):
        first = np.cumsum(step.scheduled) - reads[:, n]
        is_read = np.arange(num_tokens) >= first[request_of]
        rows = torch.from_numpy(np.flatnonzero(is_read)).to(device)
        place = np.zeros(len(step.input_ids), dtype=np.int64)
        place[:num_tokens] = np.clip(np.cumsum(is_read) - 1, 0, None)
        requests = np.flatnonzero(reads[:, n])
        shares.append(
            Share(
                requests=requests,
                behind=behind[requests, n],
                starts=np.concatenate([[0], np.cumsum(reads[requests, n])]),
                request_of=torch.from_numpy(request_of[is_read]).to(device),
                input_ids=ids[n, rows].to(step.input_ids.dtype),
                positions=own[n, rows],
                place=torch.from_numpy(place).to(device),
            )
        )
    return shares


@dataclass(frozen=True)
class OwnStep:
    """A step in which somebody brings prompts: each specialist's share, and where the keys of each layer go.

    Attributes:
        shares: One per specialist, in order.
        slots: By the name of a layer.
    """

    shares: Sequence[Share]
    slots: dict[str, Tensor]
