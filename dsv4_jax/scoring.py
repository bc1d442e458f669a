"""Log-likelihoods of given tokens by a model, in batches of a few padded lengths."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dsv4_jax.compiler import inference_options
from dsv4_jax.config import ModelConfig, Runtime
from dsv4_jax.errors import InputError
from dsv4_jax.loss import token_scores
from dsv4_jax.model import Transformer
from dsv4_jax.token_ids import check_token_ids

# Lengths are rounded up to this times a power of two, so that few programs are compiled.
SMALLEST_LENGTH = 64
MOST_ROWS = 16  # of a batch of short rows: a few requests do not wait for many of padding


class Row(NamedTuple):
    """Tokens of one document, the last of which are scored."""

    tokens: Sequence[int] | np.ndarray  # ids
    first: int  # the first token that is scored, given those before it; at least 1


class Score(NamedTuple):
    """What a model says of a row's scored tokens."""

    log_likelihood: float  # nats, summed
    greedy: bool  # each of them is the likeliest at its place


def score_rows(
    config: ModelConfig, runtime: Runtime, params: dict, rows: Sequence[Row], *,
    batch_tokens: int = 4096,
) -> list[Score]:
    """Return the score of each row.

    There is one program for each padded length, a power of two. Logits exist for a stretch of one
    batch's tokens at a time.

    Args:
      batch_tokens: of a batch, padding included, unless one row alone has more.
    Raises:
      InputError: a row has ids outside the vocabulary, no token before those that are scored, or
        more tokens than the model has positions for.
    """
    for row in rows:
        check_row(config, row)
    lengths = [_padded(len(row.tokens) - 1) for row in rows]
    scores: list[Score | None] = [None] * len(rows)
    for length in sorted(set(lengths), reverse=True):  # what may not fit in memory comes first
        chosen = [index for index, padded in enumerate(lengths) if padded == length]
        size = max(1, min(MOST_ROWS, batch_tokens // length))
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            batch = _pad([rows[index] for index in part], size, length)
            values, greedy = map(np.asarray, _program()(config, runtime, params, *batch))
            for place, index in enumerate(part):
                scored = slice(rows[index].first - 1, len(rows[index].tokens) - 1)
                total = math.fsum(values[place, scored].tolist())
                scores[index] = Score(total, bool(greedy[place, scored].all()))
    return scores


def check_row(config: ModelConfig, row: Row) -> None:
    """Refuse a row that the model cannot score.

    Raises:
      InputError: as for `score_rows`.
    """
    check_token_ids(row.tokens, config.vocab_size)
    if not 1 <= row.first <= len(row.tokens):
        raise InputError(
            f"row: expected a first scored token of 1 to {len(row.tokens)}, its number of tokens, "
            f"got {row.first}; begin with BOS, which is not scored"
        )
    inputs, room = len(row.tokens) - 1, config.max_position_embeddings
    if inputs > room:
        raise InputError(
            f"row: expected at most {room} tokens before the last (max_position_embeddings), got "
            f"{inputs}; score it in windows"
        )


def windows(
    tokens: Sequence[int] | np.ndarray, *, context: int, stride: int
) -> Iterator[Row]:
    """Cut a document into rows in which every token but its first is scored exactly once.

    Each row has `context` tokens before its last one, also where that repeats some, and all of
    them count as context. With a stride of `context` these are the windows of lm-eval's
    `loglikelihood_rolling`.

    Args:
      tokens: ids of the document, beginning with BOS.
      stride: tokens that a row scores, after the first row, which scores all of its own.
    """
    stop = 1
    while stop < len(tokens):
        first = stop
        stop = min(len(tokens), first + (context if first == 1 else stride))
        start = max(0, stop - context - 1)
        yield Row(tokens[start:stop], first - start)


def check_windows(config: ModelConfig, context: int, stride: int) -> None:
    """Refuse windows that the model has no positions for, or that would leave tokens out.

    Raises:
      InputError: they are such.
    """
    room = config.max_position_embeddings
    if not 1 <= context <= room:
        raise InputError(
            f"context: expected 1 to {room} tokens (max_position_embeddings), got {context}"
        )
    if not 1 <= stride <= context:
        raise InputError(f"stride: expected 1 to {context} tokens, the context, got {stride}")


def _padded(length: int) -> int:
    return SMALLEST_LENGTH * 2 ** ((max(1, length) - 1) // SMALLEST_LENGTH).bit_length()


def _pad(rows: list[Row], size: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens, targets and segment ids of a batch; what is no row is padding."""
    tokens, targets, segments = np.zeros((3, size, length), np.int32)
    for place, row in enumerate(rows):
        inputs = len(row.tokens) - 1
        tokens[place, :inputs], targets[place, :inputs] = row.tokens[:-1], row.tokens[1:]
        segments[place, :inputs] = 1
    return tokens, targets, segments


@functools.cache
def _program() -> Callable:
    return jax.jit(_score, static_argnums=(0, 1), compiler_options=inference_options())


def _score(config: ModelConfig, runtime: Runtime, params: dict, tokens, targets, segments):
    """Return log-likelihoods of the targets and whether they are the likeliest, both [b, t]."""
    features = Transformer(config, runtime).apply(
        {"params": params}, tokens, segments, mtp=False, method="features"
    )
    return token_scores(features.hidden, features.head, targets)
