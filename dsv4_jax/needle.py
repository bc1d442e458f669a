"""Texts with facts in them that are asked for later: to train retrieval, and to measure it.

A fact is "They call Alice falcon."; who is called what is drawn at random for each text, so that it
can only be known from the text. Between facts stand sentences that say nothing of them. All texts
follow from their seeds.

What is asked for follows the word that the question ends with, so that one layer of attention can
find it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import NamedTuple

NAMES = (
    "Alice", "Boris", "Clara", "David", "Elena", "Felix", "Grace", "Henry", "Irene", "James",
    "Karen", "Louis", "Maria", "Oscar", "Paula", "Simon",
)  # fmt: skip
ANIMALS = (
    "badger", "bear", "camel", "crane", "crow", "deer", "dove", "duck", "eagle", "falcon", "fox",
    "frog", "goat", "goose", "hare", "hawk", "horse", "lion", "lynx", "mole", "otter", "owl",
    "panda", "rabbit", "raven", "robin", "seal", "snake", "swan", "tiger", "whale", "wolf",
)  # fmt: skip
FILLER = (
    "The grass in the garden is wet.",
    "A train stops at the station.",
    "Rain falls on the roof all night.",
    "The baker opens the shop at six.",
    "Children play near the old bridge.",
    "The river runs past the mill.",
    "A letter lies on the table.",
    "The wind moves the tall trees.",
    "Snow covers the road to the hills.",
    "The clock in the hall is slow.",
    "Boats leave the harbour in the morning.",
    "The lamp by the window is on.",
)

TRAINING_TEXTS = 16384
TRAINING_WORDS = 60, 250  # words and marks of a training text, each a token or more
MOST_FACTS = 8  # of a training text
FILLER_SHARE = 0.0, 0.6  # of the sentences of a training text


class Fact(NamedTuple):
    """What somebody is called."""

    name: str
    value: str

    @property
    def statement(self) -> str:
        """The sentence that says it."""
        return f"They call {self.name} {self.value}."

    @property
    def question(self) -> str:
        """The question after it, with the beginning of the answer; the value comes next."""
        return f"What do they call {self.name}? They call {self.name}"


def draw_facts(rng: random.Random, count: int) -> list[Fact]:
    """Draw facts of different names and values."""
    return list(map(Fact, rng.sample(NAMES, count), rng.sample(ANIMALS, count)))


def training_text(number: int) -> str:
    """Write one text of the training source: facts, said again and asked for, and filler.

    The length of a text, its number of facts and its share of filler are its own.
    """
    rng = random.Random(f"needle {number}")
    filler = rng.uniform(*FILLER_SHARE)
    least, most = TRAINING_WORDS
    words = least * (most / least) ** rng.random()  # short and long ones: as many of each octave
    facts = draw_facts(rng, rng.randint(2, MOST_FACTS))
    chosen = []
    for sentence in _sentences(rng, facts, filler):
        words -= len(re.findall(r"\w+|[^\w\s]", sentence))
        if words < 0:
            break
        chosen.append(sentence)
    return " ".join(chosen)


def _sentences(rng: random.Random, unsaid: list[Fact], filler: float) -> Iterator[str]:
    """Say facts and say them again, without an end.

    What has been said longest ago comes again most often. Some facts come again at once, in reach
    of a small window: to copy these is learned first, and helps to learn the others.
    """
    said: list[Fact] = []  # the last one last
    while True:
        if rng.random() < filler:
            yield rng.choice(FILLER)
        elif not said or (unsaid and rng.random() < 0.3):
            said.append(unsaid.pop())
            yield said[-1].statement
        else:
            said.append(said.pop(0 if rng.random() < 0.5 else rng.randrange(len(said))))
            fact = said[-1]
            yield rng.choice((fact.statement, f"{fact.question} {fact.value}."))
