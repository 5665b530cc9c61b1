"""The most memory that a phase holds on one device, by part, at the moment when it holds most.

A step is followed through its moments: the loss, the backward pass of a layer, of an embedding, the optimizer; before
it, loading. Each is a sum of parts; the greatest is the peak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ultrafuser.config.recipe import Recipe
from ultrafuser.config.training import StageConfig
from ultrafuser.model.chunked_pass import MOST_TOKENS_ON_CPU
from ultrafuser.model.device import multiplies_bf16
from ultrafuser.model.loss_terms import rows_at_once
from ultrafuser.train.estimate.activations import (
    Piece,
    Precision,
    kept_around,
    kept_by_checkpoint,
    kept_by_layer,
    passing_backward,
    passing_forward,
    precision_of,
)
from ultrafuser.train.estimate.shapes import Shape, gate_parameters

MOMENTS = 2  # of AdamW, in the type of the weights
CONTEXT_BYTES = 2**29  # what CUDA and its libraries hold for themselves
FRAGMENTS = 0.05  # of a GPU's memory that lies between tensors and is no use


@dataclass(frozen=True, slots=True)
class Memory:
    """What one device holds at the worst moment.

    Attributes:
        moment: Which that is.
        parts: Bytes by part.
        host_bytes: What waits in the host's memory for one device.
    """

    moment: str
    parts: dict[str, int]
    host_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """All parts."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Job:
    """One phase on one of several devices.

    Attributes:
        recipe: All of it.
        stage: Of the phase.
        shapes: Specialists that run in it.
        pieces: Of the drawn steps of one device, step by step.
        num_devices: Processes.
        on_cpu: Where they run.
    """

    recipe: Recipe
    stage: StageConfig
    shapes: tuple[Shape, ...]
    pieces: tuple[tuple[Piece, ...], ...]
    num_devices: int
    on_cpu: bool
    precision: Precision = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", precision_of(self.recipe))

    @property
    def trains_everything(self) -> bool:
        """Whole specialists, and not adapters of them or the gate alone."""
        return self.stage.train_specialists and self.stage.lora is None

    @property
    def is_split(self) -> bool:
        """Whether each specialist has a group of devices to itself."""
        return self.recipe.train.parallel.mode == "specialist" and self.num_devices > 1 and len(self.shapes) > 1

    @property
    def is_cached(self) -> bool:
        """Whether this is stage 1 from hidden states on disk."""
        cached = self.recipe.train.stage1_cache.mode != "off"
        return cached and len(self.shapes) > 1 and not self.stage.train_specialists

    @property
    def local(self) -> tuple[Shape, ...]:
        """The specialists that one device runs: the largest, where each has a group to itself."""
        return (max(self.shapes, key=lambda shape: shape.num_parameters),) if self.is_split else self.shapes

    @property
    def parts(self) -> int:
        """Among how many devices a weight is cut."""
        return max(1, self.num_devices // len(self.shapes)) if self.is_split else self.num_devices


def measure_memory(job: Job) -> Memory:
    """The peak of a phase on one device."""
    moments = _cached_moments(job) if job.is_cached else _moments(job)
    moment, parts = max(moments.items(), key=lambda item: sum(item[1].values()))
    return Memory(moment, {name: count for name, count in parts.items() if count}, _host_bytes(job))


def standing_bytes(job: Job) -> dict[str, int]:
    """What stays from step to step on one device: weights, gradients, moments."""
    if job.recipe.train.parallel.cpu_offload and job.num_devices > 1 and not job.is_split:
        return {"weights": 0, "gradients": 0, "optimizer": 0}
    return _standing(job)


def _standing(job: Job) -> dict[str, int]:
    each = job.precision.weights
    frozen = not job.trains_everything
    whole = job.recipe.train.parallel.replicate_frozen and frozen
    weights = sum(shape.num_parameters for shape in _owned(job)) * each // (1 if whole else job.parts)
    adapters = _adapters(job) * 4 // job.parts
    gate = _gate(job) // (1 if job.is_split else job.parts)
    trained = (0 if frozen else weights) + adapters + gate
    return {"weights": weights + adapters + gate, "gradients": trained, "optimizer": MOMENTS * trained}


def _moments(job: Job) -> dict[str, dict[str, int]]:
    standing = standing_bytes(job)
    moments = {"optimizer step": dict(standing)}
    quiet = {**standing, "gradients": 0, "optimizer": 0}
    largest = max(shape.head_parameters for shape in job.local)
    moments["fingerprint of the weights"] = {**quiet, "passing": 8 * largest}  # summed as whole numbers
    if job.on_cpu and job.num_devices == 1:  # pages of a file that is read into another type are memory, too
        read = [s.num_parameters * s.saved_bytes for s in _owned(job) if s.saved_bytes != job.precision.weights]
        moments["loading"] = {**quiet, "passing": max(read, default=0)}
    # Pieces of one size hold the same at the same place: each is measured once.
    places = dict.fromkeys(
        (step > 0, number > 0, piece) for step, pieces in enumerate(job.pieces) for number, piece in enumerate(pieces)
    )
    for has_moments, has_gradients, piece in places:
        # AdamW's moments are made at the end of the first step, the first of those drawn. Gradients stand from the end
        # of a step's first piece on; a lone piece makes them as it frees activations.
        held = dict(standing)
        if not has_moments:
            held["optimizer"] = 0
        if not has_gradients:
            held["gradients"] = 0
        for moment, parts in _piece_moments(job, piece).items():
            total = held | {name: held.get(name, 0) + count for name, count in parts.items()}
            if moment not in moments or sum(total.values()) > sum(moments[moment].values()):
                moments[moment] = total
    return moments


def _piece_moments(job: Job, piece: Piece) -> dict[str, dict[str, int]]:
    """Parts that a piece adds, moment by moment."""
    gathered = _gathered(job)
    if not job.stage.train_specialists:
        hidden = [piece.tokens * shape.hidden_size * job.precision.weights for shape in job.local]
        last = passing_forward(job.local[-1], piece, job.precision)
        loss = {"activations": sum(hidden), **_loss(job, piece), "gathered": gathered}
        return {
            "forward pass": {"activations": sum(hidden[:-1]), "passing": last, "gathered": gathered},
            "loss": loss,
        }
    kept, copies, deepest, passing = 0, 0, 0, 0
    for shape in job.local:
        layer, copy = _kept(job, shape, piece), _copied(job, shape)
        kept += shape.num_layers * layer[0] + kept_around(shape, piece, job.precision)
        copies += shape.num_layers * copy
        again = layer[1] + (copy if job.recipe.train.activation_checkpointing else 0)
        deepest = max(deepest, again)
        step = passing_backward(shape, piece, job.precision, trains_weights=job.trains_everything)
        passing = max(passing, step + piece.tokens * shape.hidden_size * job.precision.weights)
    checkpointed = job.recipe.train.activation_checkpointing
    loss = _loss(job, piece)
    of_hidden = loss.pop("gradients of hidden states", 0)
    backward = {
        "activations": kept + deepest + of_hidden,
        "copies": 0 if checkpointed else copies,  # a checkpoint makes them anew, layer by layer
        "passing": passing,
        "gathered": gathered + _gradient_buffers(job),
    }
    moments = {
        "loss": {"activations": kept + of_hidden, "copies": copies, **loss, "gathered": gathered},
        "backward pass of a layer": backward,
    }
    if job.trains_everything:
        first = job.local[-1]
        freed = first.num_layers * _kept(job, first, piece)[0]
        moments["backward pass of an embedding"] = {
            "activations": kept - freed,
            "copies": 0 if checkpointed else copies - first.num_layers * _copied(job, first),
            "passing": first.head_parameters * job.precision.weights,
            "gathered": gathered,
        }
    return moments


def _kept(job: Job, shape: Shape, piece: Piece) -> tuple[int, int]:
    """What a layer keeps through the forward pass, and what its backward pass makes anew."""
    whole = kept_by_layer(shape, piece, job.precision, job.stage.lora)
    if job.recipe.train.activation_checkpointing:
        return kept_by_checkpoint(shape, piece, job.precision), whole
    return whole, 0


def _copied(job: Job, shape: Shape) -> int:
    """Copies of one layer's weights that autocast makes; where weights are gathered, they come in that type."""
    is_gathered = job.parts > 1
    return shape.layer_parameters * job.precision.compute if job.precision.is_mixed and not is_gathered else 0


def _loss(job: Job, piece: Piece) -> dict[str, int]:
    """Buffers of the loss: logits of a chunk, heads in another type, gradients of heads and hidden states.

    Source: `ultrafuser.model.chunked_pass`, whose buffers these are.
    """
    train, shapes = job.recipe.train, job.local
    trains = job.stage.train_specialists
    chunk = min(train.loss_chunk, piece.responses)
    if job.on_cpu and trains:
        chunk = min(chunk, MOST_TOKENS_ON_CPU)
    vocabulary = min(shape.vocabulary for shape in job.shapes)
    block = min(vocabulary, rows_at_once(job.on_cpu, trains))
    product = _product_bytes(job)
    low = product if product < 4 else 0
    heads = sum(shape.head_parameters for shape in shapes)
    # In the type of the products: all of them if they are trained, else a block; and a block in fp32.
    widest = block * max(shape.hidden_size for shape in shapes)
    converted = (heads if trains else widest) * product if product != job.precision.weights else 0
    parts = {
        "heads": converted + (4 * widest if low else 0),
        "activations of the gate": _gate_activations(job, piece),
    }
    hidden = sum(piece.responses * shape.hidden_size * job.precision.weights for shape in shapes)
    if not trains:  # each specialist's block, the fused one, and one for their products
        return parts | {"logits": 4 * chunk * block * (2 + len(shapes)), "hidden states": hidden}
    own = 4 if low and job.on_cpu else 0  # a specialist's own logits, whose products are in bf16
    return parts | {
        "logits": chunk * (4 * vocabulary + (low + own) * block),
        "gradients of heads": 4 * heads if job.trains_everything else 0,
        "gradients of hidden states": hidden,
    }


def _product_bytes(job: Job) -> int:
    """Of a number in the products of the loss, which makes them in fp32 where a CPU has no instructions for bf16."""
    is_bf16 = job.recipe.train.precision == "bf16" or job.recipe.dtype == "bfloat16"
    return 4 if is_bf16 and job.on_cpu and not multiplies_bf16(torch.device("cpu")) else job.precision.compute


def _gate_activations(job: Job, piece: Piece) -> int:
    if len(job.shapes) == 1 or job.recipe.fusion.weighting != "gate":
        return 0
    width = job.recipe.gate.hidden_size * (job.recipe.gate.num_layers - 1)  # what the ReLUs give
    if job.precision.weights < 4:
        width += job.local[0].hidden_size
    return piece.responses * 4 * width * len(job.local)


def _gathered(job: Job) -> int:
    """Weights that FSDP2 holds whole for a while: a layer in use, the next one, and every head."""
    if job.parts == 1:
        return 0
    frozen_whole = job.recipe.train.parallel.replicate_frozen and not job.trains_everything
    if frozen_whole:
        return 0
    layer = max(shape.layer_parameters for shape in job.local)
    heads = sum(shape.head_parameters for shape in job.local)
    return 2 * layer * job.precision.compute + heads * job.precision.weights


def _gradient_buffers(job: Job) -> int:
    """A layer's gradients before they are summed over devices, and the fp32 buffer in which they are."""
    if job.parts == 1 or not job.trains_everything:
        return 0
    return max(shape.layer_parameters for shape in job.local) * (job.precision.compute + 4)


def _cached_moments(job: Job) -> dict[str, dict[str, int]]:
    """Stage 1 from disk: one specialist beside all heads while files are made, then gate and heads alone."""
    each, precision = job.precision.weights, job.precision
    heads = sum(shape.head_parameters for shape in job.shapes) * precision.compute
    gate = _gate(job)
    largest = max(job.shapes, key=lambda shape: shape.num_parameters)
    pieces = [piece for step in job.pieces for piece in step]
    widest = max(pieces, key=lambda piece: piece.tokens)
    loaded = {"weights": largest.num_parameters * each + heads + gate}
    training: dict[str, int] = {}
    for piece in pieces:
        parts = {"weights": heads + gate, "gradients": gate, "optimizer": MOMENTS * gate, **_loss(job, piece)}
        training = max(training, parts, key=lambda found: sum(found.values()))
    return {
        "hidden states of one specialist": {**loaded, "passing": passing_forward(largest, widest, precision)},
        "loss": training,
    }


def _owned(job: Job) -> Sequence[Shape]:
    """Specialists whose weights are held: of a shared base one, its adapters apart."""
    return job.local[:1] if job.recipe.shared_base else job.local


def _adapters(job: Job) -> int:
    if not job.stage.train_specialists or job.stage.lora is None:
        return 0
    return sum(shape.adapter_parameters(job.stage.lora) for shape in job.local)


def _gate(job: Job) -> int:
    """Bytes of the gate, which is fp32 whatever the specialists are."""
    return 4 * gate_parameters(job.shapes, job.recipe)


def _host_bytes(job: Job) -> int:
    """What cpu_offload leaves in the host's memory for one device."""
    offloads = job.recipe.train.parallel.cpu_offload and job.num_devices > 1 and not job.is_split
    return sum(_standing(job).values()) if offloads else 0


def overhead_bytes(job: Job, device_bytes: int) -> int:
    """What a GPU cannot give to tensors; on a CPU, what the process held before any weight was loaded."""
    return 0 if job.on_cpu else CONTEXT_BYTES + int(FRAGMENTS * device_bytes)
