"""The math domain: word problems of one or two steps with worked answers."""

from __future__ import annotations

import random

from ultrafuser.demo.world.item import Concludes, Item

KIND_WEIGHTS = (0.4, 0.4, 0.2)  # one step, two steps, a product
LARGEST_START = 9
LARGEST_AMOUNT = {1: 9, 2: 5}  # by number of steps; so a sum stays below 20
LARGEST_GROUPS = 5

NAMES = ("Amy", "Bob", "Carl", "Dora", "Fay", "Gus")
THINGS = ("apples", "coins", "cards", "eggs", "pens", "nuts")
CONTAINERS = ("boxes", "bags", "jars")
MORE = ("finds {n} more", "buys {n} more", "gets {n} more")
LESS = ("loses {n}", "gives away {n}", "sells {n}")
ASK = "How many {things} does {name} have now?"


def draw_math(rng: random.Random) -> Item:
    """A random math item."""
    (num_steps,) = rng.choices((1, 2, 0), weights=KIND_WEIGHTS)
    return _changes(rng, num_steps) if num_steps else _groups(rng)


def _changes(rng: random.Random, num_steps: int) -> Item:
    """Something is had, and more is gained or some is lost, once or twice."""
    name, things, total = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, LARGEST_START)
    story, work = [f"{name} has {total} {things}."], []
    for _ in range(num_steps):
        amount = rng.randint(1, LARGEST_AMOUNT[num_steps])
        gains = amount >= total or rng.random() < 0.5
        after = total + amount if gains else total - amount
        story.append(f"{name} {rng.choice(MORE if gains else LESS).format(n=amount)}.")
        work.append(f"{total} {'+' if gains else '-'} {amount} = {after}.")
        total = after
    story.append(ASK.format(name=name, things=things))
    return _problem("one step" if num_steps == 1 else "two steps", story, work, total)


def _groups(rng: random.Random) -> Item:
    """Equal groups: a product."""
    name, things, container = rng.choice(NAMES), rng.choice(THINGS), rng.choice(CONTAINERS)
    groups, size = rng.randint(2, LARGEST_GROUPS), rng.randint(2, 9)
    story = [f"{name} has {groups} {container} with {size} {things} each.", ASK.format(name=name, things=things)]
    return _problem("product", story, [f"{groups} * {size} = {groups * size}."], groups * size)


def _problem(kind: str, story: list[str], work: list[str], number: int) -> Item:
    return Item("math", kind, " ".join(story), " ".join([*work, f"The answer is {number}."]), (Concludes(number),))
