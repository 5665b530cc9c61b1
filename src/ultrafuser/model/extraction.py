"""From a full fine-tune to its base and a low-rank adapter: the difference of each linear layer, cut by SVD.

Singular values of all layers and all specialists compete for the same room: a rank of a layer costs inputs + outputs
parameters and keeps the square of its singular value of the difference's energy; the cheapest energy is taken first.
What is no linear layer below the head (norms, embeddings, biases, a head of its own) cannot be carried by an adapter.

Source: Eckart and Young 1936; the extraction of adapters follows mergekit-extract-lora's idea.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ultrafuser.errors import ModelError
from ultrafuser.model.lora import Adapter

# Models that were never one differ by about 1.4 times their weights; a fine-tune by a few hundredths.
FARTHEST = 0.5


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """The largest singular values of one layer's difference, and their vectors.

    Attributes:
        outputs: [O, K] left vectors.
        values: [K], falling.
        inputs: [I, K] right vectors.
    """

    outputs: Float[Tensor, "O K"]
    values: Float[Tensor, " K"]
    inputs: Float[Tensor, "I K"]

    @property
    def cost(self) -> int:
        """Parameters of one rank."""
        return len(self.outputs) + len(self.inputs)


@dataclass(frozen=True, slots=True)
class Difference:
    """What a fine-tune changed of its base. An energy is a sum of squares of weights.

    Attributes:
        layers: Of linear layers below the head, by name.
        energy: Of the difference of these layers.
        other_energy: Of the difference of everything else, which adapters cannot carry.
        distance: Norm of the whole difference over the norm of the base.
    """

    layers: Mapping[str, LayerDifference]
    energy: float
    other_energy: float
    distance: float


@dataclass(frozen=True, slots=True)
class Extract:
    """An adapter made of a difference.

    Attributes:
        adapter: Ready to be put into the base.
        ranks: Of each layer it changes.
        num_parameters: Of the adapter.
        kept: Part of the energy of the linear layers that it has, 0 to 1.
        lost: Part of the whole difference's energy that lies outside these layers, 0 to 1.
    """

    adapter: Adapter
    ranks: Mapping[str, int]
    num_parameters: int
    kept: float
    lost: float


def check_family(base: PreTrainedModel, tuned: Mapping[str, PreTrainedModel]) -> None:
    """Refuse models of other shapes than the base; outlines without weights will do. Vocabularies may differ in rows.

    Raises:
        ModelError: A parameter is missing, or has another shape; says which.
    """
    expected = _shapes(base)
    for name, model in tuned.items():
        actual = _shapes(model)
        for key in dict.fromkeys((*expected, *actual)):
            if expected.get(key) != actual.get(key):
                theirs, ours = (shapes.get(key, "not there") for shapes in (actual, expected))
                raise ModelError(
                    f"specialist {name!r} is no fine-tune of the base: {key} is {theirs}, in the base {ours}"
                )


@torch.no_grad()
def measure_difference(base: PreTrainedModel, tuned: PreTrainedModel, *, name: str, max_rank: int) -> Difference:
    """Decompose what a fine-tune changed.

    Args:
        base: The model it was made from.
        tuned: The fine-tune.
        name: Of the specialist, for messages.
        max_rank: Singular values that are looked for in each layer.

    Raises:
        ModelError: The two are too far apart to be of one family, or are equal.
    """
    linear = _linear_weights(base)
    theirs = dict(tuned.named_parameters())
    layers: dict[str, LayerDifference] = {}
    energy = other = size = 0.0
    for key, weight in base.named_parameters():
        rows = min(len(weight), len(theirs[key]))  # of a vocabulary that was cut or has grown
        delta = theirs[key][:rows].float() - weight[:rows].float()
        size += float(weight.float().square().sum())
        if key not in linear:
            other += float(delta.square().sum())
            continue
        energy += float(delta.square().sum())
        place, is_transposed = linear[key]
        if delta.any():
            layers[place] = _decompose(delta.T if is_transposed else delta, max_rank)
    distance = ((energy + other) / size) ** 0.5
    if distance > FARTHEST:
        raise ModelError(
            f"specialist {name!r} shares no base with the model given: it differs by {distance:.2f} times its weights, "
            f"and fine-tunes of one base by far less than {FARTHEST}"
        )
    if not layers:
        raise ModelError(f"specialist {name!r} has the very linear layers of its base: there is nothing to extract")
    return Difference(layers, energy, other, distance)


def choose_ranks(differences: Mapping[str, Difference], *, energy: float, room: int) -> dict[str, dict[str, int]]:
    """Ranks by specialist and layer: the smallest adapters that keep so much, as far as there is room.

    Args:
        differences: By specialist.
        energy: Part of the energy of all linear layers' differences to keep, 0 to 1.
        room: Parameters of all adapters together, at most.
    """
    offers = [
        (float(value) ** 2 / layer.cost, float(value) ** 2, layer.cost, name, place)
        for name, difference in differences.items()
        for place, layer in difference.layers.items()
        for value in layer.values
    ]
    wanted = energy * sum(difference.energy for difference in differences.values())
    ranks: dict[str, dict[str, int]] = {name: {} for name in differences}
    for _, gain, cost, name, place in sorted(offers, reverse=True):
        if wanted <= 0 or room < cost:
            break
        ranks[name][place] = ranks[name].get(place, 0) + 1
        wanted -= gain
        room -= cost
    return ranks


def extract_adapter(difference: Difference, ranks: Mapping[str, int]) -> Extract:
    """The adapter of these ranks.

    Raises:
        ModelError: No layer has a rank: more room is needed.
    """
    from peft import LoraConfig

    if not ranks:
        raise ModelError("there is no room for a single rank: allow adapters of a larger share of the base")
    state: dict[str, Tensor] = {}
    kept = 0.0
    for place, rank in ranks.items():
        layer = difference.layers[place]
        root = layer.values[:rank].sqrt()
        state[f"{place}.lora_A"] = (layer.inputs[:, :rank] * root).T.contiguous()
        state[f"{place}.lora_B"] = (layer.outputs[:, :rank] * root).contiguous()
        kept += float(layer.values[:rank].square().sum())
    largest = max(ranks.values())
    # Alpha equals the rank everywhere, so that nothing is scaled.
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        target_modules=sorted(ranks),
        rank_pattern=dict(ranks),
        alpha_pattern=dict(ranks),
    )
    return Extract(
        adapter=Adapter(config, state),
        ranks=dict(ranks),
        num_parameters=sum(value.numel() for value in state.values()),
        kept=kept / difference.energy,
        lost=difference.other_energy / (difference.energy + difference.other_energy),
    )


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int | str, ...]]:
    embeddings: Any = model.get_input_embeddings()
    rows = len(embeddings.weight)
    return {
        key: tuple("vocabulary" if size == rows else size for size in value.shape)
        for key, value in model.named_parameters()
    }


def _linear_weights(model: PreTrainedModel) -> dict[str, tuple[str, bool]]:
    """Weights that an adapter can change: name -> (layer, whether it is kept as inputs x outputs)."""
    head = model.get_output_embeddings()
    return {
        f"{place}.weight": (place, isinstance(module, Conv1D))
        for place, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def _decompose(delta: Float[Tensor, "O I"], max_rank: int) -> LayerDifference:
    num_values = min(*delta.shape, max_rank)
    if 2 * num_values >= min(delta.shape):
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        v = vh.T
    else:
        with torch.random.fork_rng(devices=[]):  # the same extract for the same models
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(delta, q=min(num_values + 16, *delta.shape), niter=4)
    return LayerDifference(u[:, :num_values].clone(), s[:num_values].clone(), v[:, :num_values].clone())
