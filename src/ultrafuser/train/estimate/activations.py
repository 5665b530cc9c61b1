"""Activations of one specialist over one piece, in bytes: what its forward pass leaves for the backward pass.

For Llama-like layers (RMSNorm, gated inner layer) this counts the very tensors that autograd keeps, as
`tests/test_estimate_memory.py` checks against a run. Others are taken to keep, of each norm, its input and output; of
attention the same; of an inner layer its two wide tensors: a rule of thumb, which the estimate says it used.

Letters: H hidden size, I intermediate size, Q and K all queries and keys of a layer, C columns of the piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ultrafuser.alignment.encode import EncodedRecord
from ultrafuser.config.recipe import Recipe
from ultrafuser.config.training import LoraConfig
from ultrafuser.model.memory import ITEM_BYTES
from ultrafuser.train.estimate.shapes import Shape


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes of an element.

    Attributes:
        weights: Of weights in memory, and of the residual stream.
        compute: Of what matrices are multiplied in.
    """

    weights: int
    compute: int

    @property
    def is_mixed(self) -> bool:
        """Whether autocast keeps a copy of the weights in the type of the products."""
        return self.compute < self.weights


def precision_of(recipe: Recipe) -> Precision:
    """What a recipe's `dtype` and `train.precision` come to."""
    weights = ITEM_BYTES[recipe.dtype]
    return Precision(weights, 2 if recipe.train.precision == "bf16" else weights)


@dataclass(frozen=True, slots=True)
class Piece:
    """One forward pass: rows, columns of each, and response tokens in all."""

    rows: int
    columns: int
    responses: int
    is_padded: bool = True

    @property
    def tokens(self) -> int:
        """Rows x columns: padding takes memory and time like a token."""
        return self.rows * self.columns


def measure_piece(records: Sequence[EncodedRecord]) -> Piece:
    """The piece that some records make; with several templates or lengths, somebody sees padding."""
    lengths = {record.num_columns for record in records}
    prompts = {len({len(prompt) for prompt in turn.prompts}) for record in records for turn in record.turns}
    return Piece(
        rows=len(records),
        columns=max(lengths),
        responses=sum(record.num_response_tokens for record in records),
        is_padded=len(lengths) > 1 or max(prompts) > 1,
    )


def kept_by_layer(shape: Shape, piece: Piece, precision: Precision, lora: LoraConfig | None = None) -> int:
    """What one decoder layer keeps for its backward pass, copies of its weights apart."""
    hidden, inner, queries = shape.hidden_size, shape.intermediate_size, shape.query_size
    # With a mask, keys and values are repeated for every query head before they are kept.
    keys = queries if piece.is_padded else shape.key_size
    compute = precision.compute
    # What a norm gives is cast for each matrix alone: queries, keys, values; gate, up.
    readers = 5 if precision.is_mixed else 2
    if shape.is_rms:
        norms = 2 * (4 + precision.weights) * hidden + 2 * 4 + readers * compute * hidden
    else:
        norms = 2 * precision.weights * hidden + 2 * 8 + readers * compute * hidden
    attention = 2 * compute * (queries + keys) + 4 * shape.num_heads
    mask = compute * piece.columns if piece.is_padded else 0
    wide = (4 if shape.is_gated else 2) * compute * inner
    low_rank = 0
    if lora is not None:
        low_rank = 2 * precision.compute * lora.rank * len(shape.linears) // shape.num_layers
    return piece.tokens * (norms + attention + mask + wide + low_rank)


def kept_around(shape: Shape, piece: Piece, precision: Precision) -> int:
    """What the last norm keeps, with the last hidden states in the columns of the batch and of the response tokens."""
    hidden, weights = shape.hidden_size, precision.weights
    norm = (4 + weights) * hidden if shape.is_rms else weights * hidden
    mask_and_ids = piece.columns + 3 * 8
    return piece.tokens * (norm + weights * hidden + mask_and_ids) + piece.responses * weights * hidden


def kept_by_checkpoint(shape: Shape, piece: Piece, precision: Precision) -> int:
    """What a checkpointed layer keeps: the residual stream before it."""
    return piece.tokens * shape.hidden_size * precision.weights


def passing_forward(shape: Shape, piece: Piece, precision: Precision) -> int:
    """The most that a forward pass without gradients holds at once: the inner layer, two residuals, a norm."""
    hidden, compute = shape.hidden_size, precision.compute
    wide = (3 if shape.is_gated else 2) * compute * shape.intermediate_size
    cast = compute * hidden * shape.intermediate_size if precision.is_mixed else 0
    return piece.tokens * (wide + (2 * precision.weights + 4) * hidden + piece.columns) + cast


def passing_backward(shape: Shape, piece: Piece, precision: Precision, *, trains_weights: bool) -> int:
    """What the backward pass of one layer holds beside what was kept: gradients of the wide tensors and of a matrix."""
    hidden, inner, compute = shape.hidden_size, shape.intermediate_size, precision.compute
    matrix = inner * hidden * ((compute + 4 if precision.is_mixed else precision.weights) if trains_weights else 0)
    two_wide = 2 * compute * inner * piece.tokens
    if precision.is_mixed:
        return max(3 * compute * inner * piece.tokens, two_wide + matrix)
    return two_wide + matrix - compute * hidden * piece.tokens
