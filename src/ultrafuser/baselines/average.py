"""Average merging: one model whose every weight is the mean of the specialists' (Table 1)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ultrafuser.errors import ModelError


@torch.no_grad()
def average_weights(models: Sequence[PreTrainedModel]) -> PreTrainedModel:
    """Average the weights of models of one architecture, in fp32.

    Raises:
        ModelError: The models differ in a weight's name or shape, so their weights have no mean.
    """
    merged = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    for name, target in merged.state_dict().items():
        for state in states:
            if name not in state or state[name].shape != target.shape:
                raise ModelError(
                    f"weights cannot be averaged: {name} is not the same in all models; fuse logits instead"
                )
        if target.is_floating_point():
            target.copy_(torch.stack([state[name].float() for state in states]).mean(dim=0).to(target.dtype))
    return merged
