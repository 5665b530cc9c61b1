"""Own template per specialist in a paged engine: where each specialist's tokens are, as plain arithmetic. Experimental.

The engine sees one sequence a request, whose prompt is the longest of the specialists' prompts, P tokens. A specialist
whose prompt has P_i tokens keeps a sequence of its own, without holes, in the same blocks of its own layers: what the
engine calls position p is its position p - (P - P_i), and before that it has nothing yet. As P_i <= P, it always fits.

Attention masks are aligned at the bottom right: with P - P_i taken from a sequence's length, row q of a query sees the
keys up to its own position, and rows before the specialist's first token see none.

Shapes: R requests of a step, T tokens of all of them, N specialists, L columns of stored prompts, K blocks a request.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

NO_SLOT = -1  # vLLM writes no key where a slot is -1


def pads(lengths: Int[Tensor, "R N"]) -> Int[Tensor, "R N"]:
    """By how many tokens each specialist's prompt is shorter than its request's longest."""
    return lengths.amax(dim=1, keepdim=True) - lengths


def own_positions(
    positions: Int[Tensor, " T"], request_of: Int[Tensor, " T"], lengths: Int[Tensor, "R N"]
) -> Int[Tensor, "N T"]:
    """Each specialist's position of every token; negative where it has nothing yet.

    Args:
        positions: As the engine counts.
        request_of: Row of `lengths` of every token.
        lengths: Of the prompts.
    """
    return (positions[:, None] - pads(lengths)[request_of]).T


def own_ids(
    input_ids: Int[Tensor, " T"],
    own: Int[Tensor, "N T"],
    request_of: Int[Tensor, " T"],
    prompts: Int[Tensor, "R N L"],
    lengths: Int[Tensor, "R N"],
) -> Int[Tensor, "N T"]:
    """What each specialist reads: its own prompt, then the response that all share.

    Args:
        input_ids: As the engine has them: the longest prompt, then the response.
        own: From `own_positions`.
        request_of: Row of `prompts` of every token.
        prompts: Left-aligned; what is beyond a prompt's length is not read.
        lengths: Of the prompts.

    Returns:
        Ids; 0 where a specialist has nothing yet, which no other row attends to.
    """
    column = own.clamp(min=0, max=prompts.shape[-1] - 1)
    specialist = torch.arange(own.shape[0], device=own.device)[:, None]
    from_prompt = prompts[request_of[None], specialist, column]
    ids = torch.where(own < lengths[request_of].T, from_prompt, input_ids[None])
    return torch.where(own < 0, 0, ids)


def own_slots(
    own: Int[Tensor, "N T"], request_of: Int[Tensor, " T"], block_table: Int[Tensor, "R K"], block_size: int
) -> Int[Tensor, "N T"]:
    """Where in the cache each specialist's keys of every token are written; `NO_SLOT` where it has nothing yet.

    Args:
        own: From `own_positions`.
        request_of: Row of `block_table` of every token.
        block_table: The engine's, shared by all specialists.
        block_size: Tokens of a block.
    """
    column = own.clamp(min=0)
    block = block_table[request_of[None], column // block_size]
    return torch.where(own < 0, NO_SLOT, block * block_size + column % block_size)


def own_sequence_lengths(sequence_lengths: Int[Tensor, " R"], lengths: Int[Tensor, "R N"]) -> Int[Tensor, "N R"]:
    """Keys that each specialist has once a step is done: 0 while the step is before its first token."""
    return (sequence_lengths[:, None] - pads(lengths)).clamp(min=0).T
