"""Which records make up a batch: a pure function of (seed, step).

Resume, replay and any number of processes come for free, since no state is kept but the step. Every domain is
walked in its own shuffled order, anew in each epoch, so all its records are used equally often.

Source: Ding et al. 2024 (arXiv 2403.08281), Section 3.1, "Balanced sampler".
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ultrafuser.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Draw:
    """One place in a batch: a record, or two records of different domains to be joined into one."""

    domain: str
    index: int
    joined: tuple[str, int] | None = None


class Sampler:
    """Draws batches over domains.

    Args:
        sizes: Records of each domain.
        records_per_domain: Records of each domain in a batch; the batch holds that many times the number of domains.
        seed: Draws another order.
        composed_share: Part of the batch that joins two records of different domains; the rest is shared equally by the
            domains. The paper has none.
        kind: "balanced" (paper), or "proportional": records are drawn from all domains put together (the ablation).

    Raises:
        ConfigError: A domain without records, or composed records with a single domain.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        *,
        records_per_domain: int,
        seed: int,
        composed_share: float = 0.0,
        kind: Literal["balanced", "proportional"] = "balanced",
    ) -> None:
        if empty := [domain for domain, size in sizes.items() if size < 1]:
            raise ConfigError(f"no records to train on in {', '.join(empty)}: add sources, or take the domain out")
        if composed_share > 0 and len(sizes) < 2:
            raise ConfigError("composed records join two domains, but there is only one: set composed_share to 0")
        self.sizes = dict(sizes)
        self.seed = seed
        self.kind = kind
        self.batch_size = records_per_domain * len(sizes)
        self.num_composed = round(composed_share * self.batch_size)

    def batch(self, step: int) -> list[Draw]:
        """The records of one step, in order."""
        domains = list(self.sizes)
        plain = self.batch_size - self.num_composed
        draws: list[Draw] = []
        if self.kind == "proportional":
            total = sum(self.sizes.values())
            draws += [self._locate(index) for index in self._walk("all", total, step * plain, plain)]
        else:
            for position, domain in enumerate(domains):
                # What does not divide evenly goes round the domains from step to step.
                count = plain // len(domains) + ((position + step) % len(domains) < plain % len(domains))
                start = self._drawn_before(position, step, plain)
                draws += [Draw(domain, index) for index in self._walk(domain, self.sizes[domain], start, count)]
        return draws + [self._compose(step * self.num_composed + i) for i in range(self.num_composed)]

    def _drawn_before(self, position: int, step: int, plain: int) -> int:
        """Records of the domain at `position` used by all earlier steps."""
        num, extra = len(self.sizes), plain % len(self.sizes)
        rounds, rest = divmod(step, num)
        more = rounds * extra + sum((position + s) % num < extra for s in range(rest))
        return step * (plain // num) + more

    def _compose(self, number: int) -> Draw:
        """The composed record of that running number: two domains in either order, a record of each."""
        domains = list(self.sizes)
        pairs = [(a, b) for a in domains for b in domains if a != b]
        first, second = pairs[self._walk("pairs", len(pairs), number, 1)[0]]
        return Draw(
            first,
            self._walk(f"composed-first-{first}", self.sizes[first], number, 1)[0],
            (second, self._walk(f"composed-second-{second}", self.sizes[second], number, 1)[0]),
        )

    def _walk(self, stream: str, size: int, start: int, count: int) -> list[int]:
        """Positions `start` to `start + count` of an endless walk that passes every index once an epoch."""
        return [
            int(_shuffled(self.seed, stream, position // size, size)[position % size])
            for position in range(start, start + count)
        ]

    def _locate(self, index: int) -> Draw:
        for domain, size in self.sizes.items():
            if index < size:
                return Draw(domain, index)
            index -= size
        raise AssertionError("index lies within the sum of all sizes")


@lru_cache(maxsize=64)
def _shuffled(seed: int, stream: str, epoch: int, size: int) -> NDArray[np.int64]:
    key = hashlib.blake2b(f"{seed}/{stream}/{epoch}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key))).permutation(size)
