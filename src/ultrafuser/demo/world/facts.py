"""What the world knows: small tables of facts, each with several ways to ask and one way to answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Relation:
    """One table: subject to value, the questions that ask for the value, the sentence that tells it."""

    name: str
    values: dict[str, str]
    questions: tuple[str, ...]
    answer: str


def _table(rows: str) -> dict[str, str]:
    return {subject.strip(): value.strip() for subject, value in (row.split(":") for row in rows.split(","))}


RELATIONS = (
    Relation(
        "capital",
        _table(
            "France: Paris, Italy: Rome, Spain: Madrid, Germany: Berlin, Japan: Tokyo, Egypt: Cairo, Russia: Moscow, "
            "China: Beijing, Greece: Athens, Norway: Oslo, Cuba: Havana, Peru: Lima, Kenya: Nairobi, Poland: Warsaw, "
            "Austria: Vienna, Ireland: Dublin"
        ),
        (
            "What is the capital of {subject}?",
            "Which city is the capital of {subject}?",
            "Name the capital of {subject}.",
            "{subject} has which capital?",
        ),
        "The capital of {subject} is {value}.",
    ),
    Relation(
        "sound",
        _table(
            "dog: barks, cat: meows, cow: moos, duck: quacks, lion: roars, horse: neighs, bee: buzzes, snake: hisses, "
            "owl: hoots, wolf: howls"
        ),
        (
            "What sound does a {subject} make?",
            "Which sound comes from a {subject}?",
            "How does a {subject} sound?",
            "Name the sound of a {subject}.",
        ),
        "A {subject} {value}.",
    ),
    Relation(
        "young",
        _table(
            "dog: puppy, cat: kitten, cow: calf, duck: duckling, lion: cub, horse: foal, sheep: lamb, goat: kid, "
            "pig: piglet, frog: tadpole"
        ),
        (
            "What is a young {subject} called?",
            "What do we call a baby {subject}?",
            "Name the young of a {subject}.",
            "A {subject} has what young?",
        ),
        "A young {subject} is a {value}.",
    ),
    Relation(
        "food",
        _table(
            "rabbit: carrots, monkey: bananas, mouse: cheese, panda: bamboo, squirrel: nuts, horse: hay, bear: honey, "
            "frog: flies, cat: fish, dog: bones"
        ),
        (
            "What does a {subject} like to eat?",
            "Which food does a {subject} like?",
            "Name the food of a {subject}.",
            "A {subject} eats what?",
        ),
        "A {subject} likes to eat {value}.",
    ),
    Relation(
        "opposite",
        _table(
            "hot: cold, big: small, fast: slow, old: young, wet: dry, hard: soft, light: dark, happy: sad, up: down, "
            "full: empty, rich: poor, loud: quiet, early: late, strong: weak, clean: dirty, thick: thin"
        ),
        (
            "What is the opposite of {subject}?",
            "Which word is the opposite of {subject}?",
            "Name the opposite of {subject}.",
            "What is not {subject} at all?",
        ),
        "The opposite of {subject} is {value}.",
    ),
    Relation(
        "colour",
        _table(
            "grass: green, snow: white, coal: black, blood: red, a lemon: yellow, a carrot: orange, the sky: blue, "
            "a mouse: grey, a plum: purple, chocolate: brown"
        ),
        (
            "What colour is {subject}?",
            "Which colour does {subject} have?",
            "Name the colour of {subject}.",
            "What is the colour of {subject}?",
        ),
        "The colour of {subject} is {value}.",
    ),
    Relation(
        "inventor",
        _table(
            "telephone: Bell, light bulb: Edison, dynamite: Nobel, radio: Marconi, steam engine: Watt, "
            "vaccine: Jenner, aeroplane: Wright, printing press: Gutenberg"
        ),
        (
            "Who invented the {subject}?",
            "Who was the inventor of the {subject}?",
            "Name the inventor of the {subject}.",
            "The {subject} was made first by whom?",
        ),
        "The {subject} was invented by {value}.",
    ),
)
