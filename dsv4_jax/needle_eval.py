"""Measure retrieval: texts of given lengths with facts in them, asked for and scored.

The model continues each question greedily over its cache, as it writes any text.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsv4_jax.config import ModelConfig
from dsv4_jax.errors import InputError
from dsv4_jax.infer import generate
from dsv4_jax.needle import ANIMALS, FILLER, NAMES, Fact, draw_facts
from dsv4_jax.served_model import ServedModel
from dsv4_jax.terminal import timed
from dsv4_jax.tokenizer import Tokenizer

OTHER_FACTS = 3  # in a haystack, beside the one that is asked for: any value will not do
MOST_ROWS = 16  # of a batch

Rows = dict[str, dict[str, float | int | str]]


class Prompt(NamedTuple):
    """A haystack and the question at its end."""

    tokens: np.ndarray  # int32, BOS first
    answer: str
    distance: int  # tokens after the sentence that has the answer


def write_prompt(tokenizer: Tokenizer, length: int, depth: float, number: int) -> Prompt:
    """Write one of the prompts of a length and a depth; the same arguments give the same one.

    It is as long as whole sentences of filler make it, without being longer.

    Args:
      length: tokens, at least `shortest_prompt`.
      depth: where the fact lies, from 0, the beginning, to 1, just before the question; it moves
        to the nearest end of a sentence.
    """
    rng = random.Random(f"prompt {number}")  # of all lengths and depths: they ask for the same
    asked, *others = draw_facts(rng, 1 + OTHER_FACTS)
    fact, question = (_encode(tokenizer, text) for text in (asked.statement, asked.question))
    hay = [_encode(tokenizer, other.statement) for other in others]
    filler = [_encode(tokenizer, text) for text in FILLER]
    room = length - 1 - len(fact) - len(question) - sum(map(len, hay))
    while fitting := [sentence for sentence in filler if len(sentence) <= room]:
        hay.append(rng.choice(fitting))
        room -= len(hay[-1])
    rng.shuffle(hay)
    starts = list(itertools.accumulate(map(len, hay), initial=0))
    place = min(range(len(starts)), key=lambda i: abs(starts[i] - depth * starts[-1]))
    sentences = [[tokenizer.bos_id], *hay[:place], fact, *hay[place:], question]
    distance = starts[-1] - starts[place] + len(question)
    return Prompt(np.concatenate(sentences).astype(np.int32), asked.value, distance)


def shortest_prompt(tokenizer: Tokenizer) -> int:
    """Return the tokens that any facts and question fit into."""
    fact = _longest_fact(tokenizer)
    sentences = [fact.statement] * (1 + OTHER_FACTS) + [fact.question]
    return 1 + sum(len(_encode(tokenizer, sentence)) for sentence in sentences)


def answer_tokens(tokenizer: Tokenizer) -> int:
    """Return the tokens to write so that any answer ends within them: its own and one after it."""
    return len(_encode(tokenizer, _longest_fact(tokenizer).value)) + 1


def check_haystacks(
    config: ModelConfig, tokenizer: Tokenizer, lengths: Sequence[int], depths: Sequence[float]
) -> None:
    """Refuse lengths and depths that no prompts can be written for.

    Raises:
      InputError: they are such.
    """
    for name, values in (("needle_lengths", lengths), ("needle_depths", depths)):
        if not values or len(set(values)) < len(values):
            raise InputError(
                f"{name}: expected one or more different numbers, got {_listed(values)}"
            )
    least, new = shortest_prompt(tokenizer), answer_tokens(tokenizer)
    most = config.max_position_embeddings - new
    for length in lengths:
        if not least <= length <= most:
            raise InputError(
                f"needle_lengths: expected {least} tokens, which the facts and the question need, "
                f"to {most}, which leave room for {new} more in max_position_embeddings, got "
                f"{length}"
            )
    for depth in depths:
        if not 0 <= depth <= 1:
            raise InputError(
                f"needle_depths: expected 0, the beginning, to 1, the end, got {depth:g}"
            )


def measure_retrieval(
    model: ServedModel, lengths: Sequence[int], depths: Sequence[float], samples: int, *,
    batch_tokens: int,
) -> Rows:
    """Return a row for each length and depth: which share of the answers was right.

    A row also has the least distance of its facts from the end of the prompt, and how far windows
    reach through all layers: a fact beyond that is known from compressed entries alone.

    Args:
      samples: prompts of each length and depth.
      batch_tokens: of a batch, unless one prompt alone has more.
    """
    reach = model.config.num_layers * (model.config.sliding_window - 1)
    rows = {}
    for length in lengths:
        with timed(f"needles in {length} tokens"):
            prompts = [
                write_prompt(model.tokenizer, length, depth, number)
                for depth in depths for number in range(samples)
            ]
            right = _ask(model, prompts, max(1, min(MOST_ROWS, batch_tokens // length)))
        for index, depth in enumerate(depths):
            cell = slice(index * samples, (index + 1) * samples)
            rows[f"needle/{length}/{depth:g}"] = {
                "retrieved": sum(right[cell]) / samples,
                "samples": samples,
                "distance": min(prompt.distance for prompt in prompts[cell]),
                "window_reach": reach,
            }
    return rows


def is_answer(text: str, answer: str) -> bool:
    """Say whether a continuation begins with the answer, to the end of its last word."""
    return re.match(rf"\s*{re.escape(answer)}\b", text) is not None


def retrieval_table(rows: Rows) -> list[str]:
    """Write rows of `measure_retrieval` as lines of text: shares by length and depth."""
    lengths, depths, shares = shares_of(rows)
    heads = ["", *(f"depth {depth:g}" for depth in depths)]
    body = [
        [f"needle in {length} tokens", *(f"{share:.2f}" for share in line)]
        for length, line in zip(lengths, shares, strict=True)
    ]
    wide = [max(map(len, column)) for column in zip(heads, *body, strict=True)]
    return [
        "  ".join([line[0].ljust(wide[0]), *map(str.rjust, line[1:], wide[1:])])
        for line in [heads, *body]
    ]


def shares_of(rows: Rows) -> tuple[list[int], list[float], np.ndarray]:
    """Return the lengths, the depths, and the share retrieved at each [length, depth]."""
    cells = [(*name.split("/")[1:], row["retrieved"]) for name, row in rows.items()]
    lengths = sorted({int(length) for length, _, _ in cells})
    depths = sorted({float(depth) for _, depth, _ in cells})
    shares = np.full((len(lengths), len(depths)), math.nan)
    for length, depth, share in cells:
        shares[lengths.index(int(length)), depths.index(float(depth))] = share
    return lengths, depths, shares


def _ask(model: ServedModel, prompts: list[Prompt], size: int) -> list[bool]:
    """Let the model continue prompts, so many at a time; return which answers are right."""
    right = []
    for first in range(0, len(prompts), size):
        batch = prompts[first : first + size]
        written = generate(
            model.config, model.params, [prompt.tokens for prompt in batch], temperature=0.0,
            max_new_tokens=answer_tokens(model.tokenizer), runtime=model.runtime,
        )
        texts = map(model.tokenizer.decode, written.tokens)
        right += [is_answer(text, prompt.answer) for text, prompt in zip(texts, batch, strict=True)]
    return right


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Encode text as it is within a line; tokens end where words do, so that sentences add up."""
    return tokenizer.encode(f" {text}")


def _longest_fact(tokenizer: Tokenizer) -> Fact:
    """Return a fact of the most tokens."""
    name, animal = (
        max(words, key=lambda word: len(_encode(tokenizer, word))) for words in (NAMES, ANIMALS)
    )
    return Fact(name, animal)


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values) or "none"
