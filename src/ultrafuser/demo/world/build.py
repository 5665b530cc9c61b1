"""Sets of items: any number of them, of one domain and one split, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count as counting

from ultrafuser.demo.world.code import draw_code
from ultrafuser.demo.world.item import Item, Split
from ultrafuser.demo.world.math import draw_math
from ultrafuser.demo.world.mixed import COMPOSITIONS, compose_mixed
from ultrafuser.demo.world.split import split_of
from ultrafuser.demo.world.text import draw_text
from ultrafuser.errors import DataError

_DRAW: dict[str, Callable[[random.Random], Item]] = {"text": draw_text, "code": draw_code, "math": draw_math}
DOMAINS = tuple(_DRAW)

MAX_MISSES = 1_000  # draws in a row that bring nothing new: the domain has no more items


def make_items(domain: str, split: Split, count: int, seed: int) -> list[Item]:
    """Items of one domain and split, no two with the same question.

    Args:
        domain: ``text``, ``code`` or ``math``; ``mixed`` is `make_mixed`.
        split: Items of different splits never share a question.
        count: How many.
        seed: The same arguments give the same items, and fewer of them a prefix.

    Raises:
        DataError: An unknown domain, or it has fewer than `count` items in this split.
    """
    if domain == "mixed":
        return make_mixed(split, count, seed)
    if domain not in _DRAW:
        raise DataError(f"unknown domain {domain!r}; the world has {', '.join(DOMAINS)} and mixed")
    rng, draw = random.Random(f"{domain} {split} {seed}"), _DRAW[domain]
    return _distinct(lambda: _draw_from(split, draw, rng), count, f"{domain}/{split}")


def make_mixed(split: Split, count: int, seed: int) -> list[Item]:
    """Questions whose one answer needs two or three domains, the compositions taking turns.

    Raises:
        DataError: The training split, which by definition has no such questions.
    """
    if split == "train":
        raise DataError("mixed questions are for validation and test: training must not see their compositions")
    rng = random.Random(f"mixed {split} {seed}")
    turns = counting()

    def draw() -> Item:
        composition = COMPOSITIONS[next(turns) % len(COMPOSITIONS)]
        domains = rng.sample(DOMAINS, composition.num_parts)
        return compose_mixed(composition, [_draw_from(split, _DRAW[domain], rng) for domain in domains])

    return _distinct(draw, count, f"mixed/{split}")


def _draw_from(split: Split, draw: Callable[[random.Random], Item], rng: random.Random) -> Item:
    while split_of((item := draw(rng)).question) != split:
        pass
    return item


def _distinct(draw: Callable[[], Item], count: int, name: str) -> list[Item]:
    items: dict[str, Item] = {}
    misses = 0
    while len(items) < count:
        item = draw()
        misses = misses + 1 if item.question in items else 0
        items.setdefault(item.question, item)
        if misses > MAX_MISSES:
            raise DataError(f"{name} has only about {len(items)} different items, not {count}; ask for fewer")
    return list(items.values())
