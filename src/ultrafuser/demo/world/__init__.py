"""The demo's world: text, code and math questions made on the spot, with answers a program can check."""

from ultrafuser.demo.world.build import DOMAINS, make_items, make_mixed
from ultrafuser.demo.world.check import are_correct, is_correct, split_parts
from ultrafuser.demo.world.item import Check, Computes, Concludes, Item, Says, Split
from ultrafuser.demo.world.split import split_of

__all__ = [
    "DOMAINS",
    "Check",
    "Computes",
    "Concludes",
    "Item",
    "Says",
    "Split",
    "are_correct",
    "is_correct",
    "make_items",
    "make_mixed",
    "split_of",
    "split_parts",
]
