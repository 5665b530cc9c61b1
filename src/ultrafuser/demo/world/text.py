"""The text domain: facts to know, and small stories to read."""

from __future__ import annotations

import random

from ultrafuser.demo.world.facts import RELATIONS, Relation
from ultrafuser.demo.world.item import Item, Says

OPENINGS = ("", "Please tell me: ", "Question: ", "I want to know: ")
FACT_SHARE = 0.5

NAMES = ("Mia", "Tom", "Ann", "Ben", "Eva", "Leo", "Zoe", "Max")
THINGS = ("kite", "hat", "ball", "book", "cup", "bag", "car", "drum")
COLOURS = ("red", "blue", "green", "black", "white", "yellow")
PLACES = ("garden", "kitchen", "park", "school", "shop", "forest")
TWO_PEOPLE_SHARE = 0.25


def draw_text(rng: random.Random) -> Item:
    """A random text item: a fact, or a story with a question about it."""
    return _fact(rng) if rng.random() < FACT_SHARE else rng.choice((_possession, _place))(rng)


def fact_questions(relation: Relation, subject: str) -> list[str]:
    """All ways to ask for one fact."""
    return [opening + question.format(subject=subject) for question in relation.questions for opening in OPENINGS]


def _fact(rng: random.Random) -> Item:
    relation, subject = rng.choice([(relation, subject) for relation in RELATIONS for subject in relation.values])
    value = relation.values[subject]
    others = tuple(sorted(set(relation.values.values()) - {value, subject}))
    return Item(
        domain="text",
        kind="fact",
        question=rng.choice(fact_questions(relation, subject)),
        answer=relation.answer.format(subject=subject, value=value),
        checks=(Says(value, others),),
    )


def _possession(rng: random.Random) -> Item:
    """People have one thing each: who, which thing, what colour?"""
    num_people = _num_people(rng)
    people, things, colours = (rng.sample(pool, num_people) for pool in (NAMES, THINGS, COLOURS))
    story = [f"{who} has a {colour} {thing}." for who, colour, thing in zip(people, colours, things, strict=True)]
    asked = rng.randrange(num_people)
    who, colour, thing = people[asked], colours[asked], things[asked]
    question, answer, wanted, others = rng.choice(
        (
            (f"Who has the {thing}?", f"{who} has the {thing}.", who, NAMES),
            (f"What does {who} have?", f"{who} has a {colour} {thing}.", f"{colour} {thing}", THINGS),
            (f"What colour is the {thing}?", f"The {thing} is {colour}.", colour, COLOURS),
        )
    )
    return _story([*story, question], answer, wanted, others)


def _place(rng: random.Random) -> Item:
    """People are somewhere: who is where?"""
    num_people = _num_people(rng)
    people, places = rng.sample(NAMES, num_people), rng.sample(PLACES, num_people)
    verb = rng.choice(("is in", "went to", "waits at"))
    story = [f"{who} {verb} the {place}." for who, place in zip(people, places, strict=True)]
    asked = rng.randrange(num_people)
    who, place = people[asked], places[asked]
    question, wanted, others = rng.choice(
        ((f"Where is {who} now?", place, PLACES), (f"Who {verb} the {place}?", who, NAMES))
    )
    return _story([*story, question], f"{who} {verb} the {place}.", wanted, others)


def _num_people(rng: random.Random) -> int:
    return 2 if rng.random() < TWO_PEOPLE_SHARE else 1


def _story(sentences: list[str], answer: str, wanted: str, candidates: tuple[str, ...]) -> Item:
    others = tuple(candidate for candidate in candidates if candidate not in wanted.split())
    kind = "story of one" if len(sentences) == 2 else "story of two"
    return Item("text", kind, " ".join(sentences), answer, (Says(wanted, others),))
