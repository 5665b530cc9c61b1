"""Records in the order in which training draws them, as a map-style data set: for loops other than ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from ultrafuser.alignment.encode import EncodedRecord
from ultrafuser.data.sampler import Sampler
from ultrafuser.errors import ConfigError


class DrawnRecords:
    """The batches of a sampler laid end to end; item i is a pure function of i, so a run may resume anywhere.

    Read in order, in batches of `batch_size` records, it gives what our own loop trains on in each step.

    Args:
        records: Encoded records of each domain.
        sampler: Draws from them; without composed records, which are made while they are drawn.
        steps: How many batches.

    Raises:
        ConfigError: The sampler composes records.
    """

    def __init__(self, records: Mapping[str, Sequence[EncodedRecord]], sampler: Sampler, *, steps: int) -> None:
        if sampler.num_composed:
            raise ConfigError("composed records are joined by our own loop alone: set composed_share to 0")
        self.records, self.steps, self.batch_size = records, steps, sampler.batch_size
        self._batch = lru_cache(maxsize=8)(sampler.batch)

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def __getitem__(self, index: int) -> EncodedRecord:
        if not 0 <= index < len(self):
            raise IndexError(index)
        step, place = divmod(index, self.batch_size)
        draw = self._batch(step)[place]
        return self.records[draw.domain][draw.index]
