"""FusedCache: one key-value cache per specialist behind the interface of a single one.

The layers of all specialists form one list, so whatever `generate()` does to a cache (crop, reorder, reset,
repeat) happens to all of them; each specialist is handed its own view, which shares the layer objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig


class FusedCache(Cache):
    """Caches of several specialists that advance together.

    Args:
        views: The specialists' own caches by name, in order; their layers must exist already (built from a config).
    """

    def __init__(self, views: Mapping[str, Cache]) -> None:
        super().__init__(layers=[layer for view in views.values() for layer in view.layers])
        self.views = dict(views)
        self.held_scores: Tensor | None = None  # [B, N]: the prompt's scores where granularity is "prompt"

    @classmethod
    def from_configs(cls, configs: Mapping[str, PreTrainedConfig]) -> FusedCache:
        """A growing cache for each specialist."""
        return cls({name: DynamicCache(config=config) for name, config in configs.items()})

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Columns held so far (of the first specialist: outside `forward` all hold the same)."""
        length: int | Tensor = next(iter(self.views.values())).get_seq_length(layer_idx)
        # A static cache gives its counter itself, which moves when the first specialist has run.
        return length.clone() if isinstance(length, Tensor) else length

    def reset(self) -> None:
        """Forget everything, the held scores too."""
        super().reset()  # type: ignore[no-untyped-call]
        self.held_scores = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        if self.held_scores is not None:
            self.held_scores = self.held_scores[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        if self.held_scores is not None:
            self.held_scores = self.held_scores.repeat_interleave(repeats, dim=0)

    def reorder_cache(self, beam_idx: Tensor) -> Any:
        """Reorder rows, as beam search does."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        if self.held_scores is not None:
            self.held_scores = self.held_scores.index_select(0, beam_idx.to(self.held_scores.device))


class JointCache(FusedCache):
    """One cache of N x B rows, specialist by specialist, for specialists that run as one forward.

    Args:
        joint: The cache of the joint model.
        num_specialists: N.
    """

    def __init__(self, joint: Cache, num_specialists: int) -> None:
        super().__init__({"joint": joint})
        self.joint = joint
        self.num_specialists = num_specialists

    @classmethod
    def from_configs(cls, configs: Mapping[str, PreTrainedConfig]) -> JointCache:
        """A growing cache; the configurations are of one architecture."""
        return cls(DynamicCache(config=next(iter(configs.values()))), len(configs))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of every specialist."""
        Cache.batch_select_indices(self, self._of_all(indices))
        if self.held_scores is not None:
            self.held_scores = self.held_scores[indices]

    def reorder_cache(self, beam_idx: Tensor) -> Any:
        """Reorder the rows of every specialist."""
        Cache.reorder_cache(self, self._of_all(beam_idx))  # type: ignore[arg-type]
        if self.held_scores is not None:
            self.held_scores = self.held_scores.index_select(0, beam_idx.to(self.held_scores.device))

    def _of_all(self, rows: Tensor) -> Tensor:
        first: Any = self.layers[0]
        keys = first.keys
        num_rows = 0 if keys is None else keys.shape[0] // self.num_specialists
        if rows.dtype == torch.bool:
            rows = rows.nonzero().flatten()
        return torch.cat([rows + j * num_rows for j in range(self.num_specialists)])
