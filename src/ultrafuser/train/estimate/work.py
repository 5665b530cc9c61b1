"""What a phase takes in operations and in hours.

A token costs 2 operations a parameter of the backbone forward, 4 backward, and 2 once more where activations are
checkpointed: 6 N D, or 8 N D; of frozen weights the gradient is left out (4 backward becomes 2 with adapters, 0 in
stage 1). Attention adds two products of all pairs of columns, the heads 2 operations a parameter and response token.
"""

from __future__ import annotations

from dataclasses import dataclass

from ultrafuser.train.estimate.devices import Devices
from ultrafuser.train.estimate.memory import Job
from ultrafuser.train.estimate.shapes import Shape


@dataclass(frozen=True, slots=True)
class Work:
    """A phase in tokens and operations, over all devices.

    Attributes:
        steps: Of the phase.
        pieces_per_step: Forward passes of one device, on average.
        columns_per_step: Rows x columns, padding included, on average.
        padding: Part of these that is padding at the end of rows.
        responses_per_step: Response tokens, on average.
        flops: Operations of the phase.
        hours: At the devices' rate and utilisation.
    """

    steps: int
    pieces_per_step: float
    columns_per_step: float
    padding: float
    responses_per_step: float
    flops: float
    hours: float


def measure_work(job: Job, devices: Devices, *, columns: float, responses: float) -> Work:
    """Tokens, operations and time of a phase.

    Args:
        job: With the pieces of one device.
        devices: What it runs on.
        columns: Of the records of a step, over all devices and without padding.
        responses: Response tokens of a step, over all devices.
    """
    steps = len(job.pieces)
    shares = job.num_devices if not job.is_split else job.parts
    padded = shares * sum(piece.tokens for step in job.pieces for piece in step) / steps
    squares = shares * sum(piece.tokens * piece.columns for step in job.pieces for piece in step) / steps
    in_backbones = sum(_backbone_flops(job, shape, padded, squares) for shape in job.shapes)
    in_heads = sum(_head_flops(job, shape, responses) for shape in job.shapes)
    flops = job.stage.steps * (in_backbones + in_heads)
    rate = devices.count * devices.flops_per_s["bf16" if job.precision.compute == 2 else "fp32"] * devices.utilisation
    return Work(
        steps=job.stage.steps,
        pieces_per_step=sum(map(len, job.pieces)) / steps,
        columns_per_step=padded,
        padding=max(0.0, 1 - columns / padded),
        responses_per_step=responses,
        flops=flops,
        hours=flops / rate / 3600,
    )


def _backbone_flops(job: Job, shape: Shape, columns: float, squares: float) -> float:
    embeddings = shape.head_parameters * (1 if shape.is_tied else 2)
    forward = 2 * (shape.num_parameters - embeddings) * columns
    attention = 4 * shape.num_layers * shape.query_size * squares
    return forward * _passes(job) + attention * _passes(job, is_product=True)


def _passes(job: Job, *, is_product: bool = False) -> int:
    """Forward passes that the whole of a piece is worth; a product of two activations has two gradients, always."""
    if not job.stage.train_specialists:
        return 1
    again = 1 if job.recipe.train.activation_checkpointing else 0
    return 1 + again + (2 if job.trains_everything or is_product else 1)


def _head_flops(job: Job, shape: Shape, responses: float) -> float:
    forward = 2 * shape.head_parameters * responses
    if not job.stage.train_specialists:
        return forward  # the gradient of a gate weight comes from the logits that are there
    return forward * (3 if job.trains_everything else 2)
