"""How varied instructions are: how near each one's nearest neighbour is, and a map of the domains (Figure 3).

Texts become vectors by a model that the caller gives, or, without one, by their words (TF-IDF). Distances are cosine
distances: 0 for the same direction, 1 for nothing in common.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from statistics import fmean, median
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from ultrafuser.synthesis.node import fraction_of

Embed = Callable[[Sequence[str]], Any]  # one row per text, whatever numpy reads
WORDS = "TF-IDF of words: no model was given, so texts that say the same in other words count as different"
NEAR = 0.1  # a distance below which two instructions are near
PERPLEXITY = 30.0  # of t-SNE: its authors' middle value; fewer for few texts
DIMENSIONS = 50  # to which word vectors are brought before t-SNE, as its authors do


class DomainDiversity(BaseModel):
    """Of a sample of a domain's instructions.

    Attributes:
        mean_distance: Cosine distance to the nearest other one of the sample.
        near: Share whose nearest neighbour is closer than `NEAR`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    domain: str
    instructions: int
    mean_distance: float
    median_distance: float
    near: float


class Diversity(BaseModel):
    """Of all domains.

    Attributes:
        by: What made vectors of texts.
        silhouette: 1 where domains are apart, 0 where they mix (Rousseeuw 1987); None for one domain.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: str
    domains: tuple[DomainDiversity, ...]
    silhouette: float | None = None


class Place(NamedTuple):
    """An instruction on the map."""

    domain: str
    x: float
    y: float


class Sample:
    """The texts with the lowest draws of their keys: the same whatever the order they come in."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._heap: list[tuple[float, str]] = []

    def add(self, key: str, text: str) -> None:
        """Offer a text."""
        entry = (-fraction_of(key, "diversity"), text)
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    def texts(self) -> list[str]:
        """What was drawn, in the order of the draws."""
        return [text for _, text in sorted(self._heap, reverse=True)]


def can_compare() -> bool:
    """Whether scikit-learn is installed."""
    return find_spec("sklearn") is not None


def find_diversity(
    texts: dict[str, list[str]], *, embed: Embed | None = None, by: str = WORDS, seed: int = 0
) -> tuple[Diversity, list[Place]]:
    """Nearest neighbours, silhouette and map of samples; a domain of fewer than two texts is left out.

    Args:
        texts: By domain.
        embed: Makes vectors; None: by words.
        by: Who embeds, for the reader.
        seed: Of the map.
    """
    texts = {domain: found for domain, found in texts.items() if len(found) > 1}
    labels = [domain for domain, found in texts.items() for _ in found]
    if not labels:
        return Diversity(by=by, domains=()), []
    vectors = _vectors([text for found in texts.values() for text in found], embed)
    domains = []
    for domain in texts:
        rows = [row for row, label in enumerate(labels) if label == domain]
        domains.append(_nearest(domain, vectors[rows]))
    silhouette = None
    if len(texts) > 1 and len(labels) > len(texts):
        from sklearn.metrics import silhouette_score

        silhouette = float(silhouette_score(vectors, labels))
    return Diversity(by=by, domains=tuple(domains), silhouette=silhouette), _map(vectors, labels, seed)


def _vectors(texts: list[str], embed: Embed | None) -> Any:
    if embed is not None:
        import numpy as np

        return np.asarray(embed(texts), dtype=np.float64)
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", sublinear_tf=True).fit_transform(texts)


def _nearest(domain: str, vectors: Any) -> DomainDiversity:
    from sklearn.neighbors import NearestNeighbors

    found, _ = NearestNeighbors(n_neighbors=1, metric="cosine", algorithm="brute").fit(vectors).kneighbors()
    distances = [max(0.0, float(row[0])) for row in found]
    return DomainDiversity(
        domain=domain,
        instructions=len(distances),
        mean_distance=fmean(distances),
        median_distance=median(distances),
        near=fmean(distance < NEAR for distance in distances),
    )


def _map(vectors: Any, labels: Sequence[str], seed: int) -> list[Place]:
    """Two dimensions in which neighbours stay neighbours (van der Maaten and Hinton 2008)."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.manifold import TSNE

    if len(labels) < 4:
        return []
    if hasattr(vectors, "toarray"):
        components = min(DIMENSIONS, min(vectors.shape) - 1)
        vectors = (
            TruncatedSVD(components, random_state=seed).fit_transform(vectors) if components > 1 else vectors.toarray()
        )
    if vectors.shape[1] < 2:
        return []
    tsne = TSNE(n_components=2, perplexity=min(PERPLEXITY, (len(labels) - 1) / 3), init="pca", random_state=seed)
    places: Iterable[Any] = tsne.fit_transform(vectors)
    return [Place(label, float(x), float(y)) for label, (x, y) in zip(labels, places, strict=True)]
