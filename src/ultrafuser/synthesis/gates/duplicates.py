"""Gates of duplicates: exact ones by a hash, near ones by MinHash bands in the store and then by comparing for real.

A near duplicate shares most of its word sequences with a kept text. Bands of its MinHash signature find candidates,
whose similarity is then computed exactly; so no text is dropped for a likeness that is not there.

Source: Broder 1997 (MinHash); Leskovec et al. 2014, Chapter 3 (bands). Signatures are datasketch's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ultrafuser.errors import ConfigError
from ultrafuser.synthesis.gates.base import GateContext
from ultrafuser.synthesis.gates.settings import DuplicatesSettings, NearDuplicatesSettings
from ultrafuser.synthesis.gates.texts import hash_of, jaccard, normalised, scope_of, shingles
from ultrafuser.synthesis.node import Item
from ultrafuser.synthesis.recipe import GateName

RECALL = 0.9
MAX_SHINGLES = 5000  # of a text that are signed: a longer text is told from others by these


@dataclass(frozen=True)
class DuplicatesGate:
    """Drops a text that was kept before, but for case, spaces and punctuation."""

    settings: DuplicatesSettings
    name: GateName = "duplicates"

    def judge(self, item: Item, context: GateContext) -> str | None:
        """The same words as a kept item."""
        words = normalised(item.text)
        others = context.bands.candidates(scope_of(item, self.settings.scope, "same"), [hash_of(words)])
        return "same text" if any(_is_other(item, it) and normalised(it.text) == words for it in others) else None

    def kept(self, item: Item, context: GateContext) -> None:
        """Later ones are compared with it."""
        context.bands.add(scope_of(item, self.settings.scope, "same"), item, [hash_of(normalised(item.text))])


class NearDuplicatesGate:
    """Drops a text most of whose word sequences a kept one has.

    Raises:
        ConfigError: datasketch is not installed (when made).
    """

    name: GateName = "near_duplicates"

    def __init__(self, settings: NearDuplicatesSettings) -> None:
        self.settings = settings
        try:
            from datasketch import MinHash
        except ImportError:
            raise ConfigError("near duplicates need datasketch: pip install 'ultrafuser[synthesis]'") from None
        self.num_bands, self.rows = bands_for(settings.threshold, settings.permutations)
        self._empty: Any = MinHash(num_perm=settings.permutations, seed=1, hashfunc=_hash32)
        self._last: tuple[str, list[int]] = ("", [])

    def judge(self, item: Item, context: GateContext) -> str | None:
        """Like a kept item, by at least the threshold."""
        own = shingles(item.text, self.settings.words)
        for other in context.bands.candidates(self._scope(item), self.bands(item)):
            if _is_other(item, other) and jaccard(own, shingles(other.text, self.settings.words)) >= (
                self.settings.threshold
            ):
                return "like another text"
        return None

    def kept(self, item: Item, context: GateContext) -> None:
        """Later ones are compared with it."""
        context.bands.add(self._scope(item), item, self.bands(item))

    def bands(self, item: Item) -> list[int]:
        """Hashes of the bands of its signature."""
        if self._last[0] != item.key:
            signature = self._empty.copy()
            chosen = sorted(shingles(item.text, self.settings.words))[:MAX_SHINGLES]
            signature.update_batch([shingle.encode("utf-8", "surrogatepass") for shingle in chosen])
            values, rows = signature.hashvalues, self.rows
            hashes = [
                hash_of(f"{band}:{values[band * rows : (band + 1) * rows].tolist()}") for band in range(self.num_bands)
            ]
            self._last = (item.key, hashes)
        return self._last[1]

    def _scope(self, item: Item) -> str:
        return scope_of(item, self.settings.scope, "near")


def bands_for(threshold: float, permutations: int) -> tuple[int, int]:
    """Bands of a signature and rows of each: as many rows as find 9 in 10 of the pairs right at the threshold.

    Of more similar pairs they find more; of less similar ones some, which comparing them turns away.
    """
    rows = max(
        (rows for rows in range(1, permutations + 1) if 1 - (1 - threshold**rows) ** (permutations // rows) >= RECALL),
        default=1,
    )
    return permutations // rows, rows


def _is_other(item: Item, other: Item) -> bool:
    """What an item was made from is like it, and is replaced by it."""
    return other.key not in (item.key, item.parent)


@lru_cache(maxsize=65536)
def _hash32(data: bytes) -> int:
    import hashlib

    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "big")
