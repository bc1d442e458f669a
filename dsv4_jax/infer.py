"""Continue prompts: read them, then draw token after token, rows of a batch at their own pace."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.cache import init_cache
from dsv4_jax.chunks import power_of_two_times
from dsv4_jax.config import SEEDS, ModelConfig, Runtime, is_seed
from dsv4_jax.decode import CHUNK, Drawn, Draws, Turn, first_turn, next_turn, prefill
from dsv4_jax.errors import InputError
from dsv4_jax.sampling import check_sampling
from dsv4_jax.token_ids import check_token_ids

SMALLEST_BATCH = 2  # of an invariant runtime: a single row is compiled and rounded otherwise
SMALLEST_CACHE = 1024  # tokens; caches are this times a power of two, so that programs are reused

Row = np.ndarray | jax.Array | Sequence[int]
Prompts = Row | Sequence[Row]
OnTokens = Callable[[int, list[int]], bool | None]


class Stats(NamedTuple):
    """What a generation took."""

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float  # up to every row's first token, compilation included
    decode_seconds: float  # from the first step's tokens on
    decode_tokens: int  # drawn in that time, of all rows
    drafted: int  # drafts that the model has judged
    accepted: int  # drafts that were right


class Generated(NamedTuple):
    """The continuation of each prompt."""

    tokens: list[np.ndarray]  # int32; the stop token that ended a row is left out
    stopped: list[bool]  # by a stop token; else by length
    stats: Stats


INVARIANT = Runtime(batch_invariant=True)


def generate(
    config: ModelConfig, params: dict, tokens: Prompts, *, max_new_tokens: int,
    temperature: float = 1.0, top_p: float = 1.0, seed: int = 0, stop: int | Iterable[int] = (),
    runtime: Runtime = INVARIANT, speculate: bool = False, chunk: int = CHUNK,
    max_length: int | None = None, on_tokens: OnTokens | None = None,
) -> Generated:
    """Continue one prompt or several.

    With a `batch_invariant` runtime, on a CPU that may not fuse multiplications and additions
    (`XLA_FLAGS=--xla_cpu_max_isa=AVX`), a prompt's logits do not depend on the prompts beside it by
    a single bit, for up to 16 of them. What is drawn depends on the seed, the prompt's place in
    the batch and the position alone.

    Args:
      tokens: ids of a prompt, or of several; begin with BOS.
      max_new_tokens: after each prompt.
      temperature: divides the logits; 0 takes the likeliest token.
      top_p: draw from the smallest set of likeliest tokens that holds so much of the mass.
      stop: ids that end a row.
      runtime: its `cache` is the precision of the cache.
      speculate: draft by multi-token prediction. What is drawn stays the same, up to rounding.
      chunk: tokens of a prompt that are read at once; bounds the memory of reading.
      max_length: tokens that the cache has room for in each row; by default what is needed,
        rounded up.
      on_tokens: called with the number of a prompt and its next tokens as they come; where it
        returns True, the prompt's continuation ends with them.
    Raises:
      InputError: a prompt is empty, has other ids than the vocabulary or leaves too little of the
        context for the new tokens; a setting is out of its range.
    """
    started = time.perf_counter()
    sampling = check_sampling(temperature, top_p)
    prompts = check_prompts(config, tokens)
    check_numbers(seed, max_new_tokens=max_new_tokens, chunk=chunk)
    stop_ids = _check_stop(config, stop)
    length = cache_length(config, prompts, max_new_tokens, max_length)
    least = SMALLEST_BATCH if runtime.batch_invariant else 1
    rows = power_of_two_times(least, len(prompts))
    cache = init_cache(config, runtime, rows=rows, max_length=length, drafting=speculate)

    book = _Book(len(prompts), rows, max_new_tokens, stop_ids, on_tokens)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))
    draws = Draws(keys, jnp.array(sampling, jnp.float32))
    model = (config, runtime, params)
    logits, cache = prefill(*model, cache, *_pad(prompts, rows), chunk=chunk)
    turn = first_turn(*model, cache, logits, draws, kind=sampling.kind)
    book.take(np.asarray(turn.token)[:, None], np.ones(rows, int))
    prefilled = time.perf_counter()

    def step(turn: Turn) -> tuple[Turn, Drawn]:
        return next_turn(*model, turn, book.active, draws, kind=sampling.kind)

    seconds, decoded = _decode_rows(book, turn, step)
    drafts = (book.drafted, book.accepted) if speculate else (0, 0)
    read, new = sum(map(len, prompts)), sum(map(len, book.tokens))
    stats = Stats(read, new, prefilled - started, seconds, decoded, *drafts)
    return Generated([np.array(row, np.int32) for row in book.tokens], book.stopped, stats)


def _decode_rows(
    book: _Book, turn: Turn, step: Callable[[Turn], tuple[Turn, Drawn]]
) -> tuple[float, int]:
    """Step until every row is done; return the seconds since the first and the tokens in them.

    A step is begun before the tokens of the one before are looked at, so that the devices need
    not wait. The last one's are not needed.
    """
    drawn, first, so_far = None, None, 0
    while np.any(book.active):
        turn, following = step(turn)
        if drawn is not None:
            book.take(np.asarray(drawn.tokens), np.asarray(drawn.count))
            if first is None:
                first, so_far = time.perf_counter(), sum(map(len, book.tokens))
        drawn = following
    if first is None:
        return 0.0, 0
    return time.perf_counter() - first, sum(map(len, book.tokens)) - so_far


class _Book:
    """What has been drawn, and which rows go on."""

    def __init__(
        self, prompts: int, rows: int, limit: int, stop_ids: frozenset[int],
        on_tokens: OnTokens | None,
    ):
        self.tokens: list[list[int]] = [[] for _ in range(prompts)]
        self.stopped = [False] * prompts
        self.active = np.arange(rows) < prompts  # rows beyond the prompts are padding
        self.drafted = self.accepted = 0
        self._limit, self._stop_ids, self._on_tokens = limit, stop_ids, on_tokens

    def take(self, tokens: np.ndarray, count: np.ndarray) -> None:
        """Note the tokens [rows, s] of one step, the first `count` of each row."""
        active = self.active.copy()  # a step that has begun goes on with what it was given
        for row in np.flatnonzero(self.active).tolist():
            if self.tokens[row]:  # the first token had no draft
                self.drafted += 1
                self.accepted += int(count[row]) - 1
            room = self._limit - len(self.tokens[row])
            new = tokens[row, : min(count[row], room)].tolist()
            end = next((i for i, token in enumerate(new) if token in self._stop_ids), None)
            self.stopped[row] = end is not None
            self.tokens[row] += new[:end]
            active[row] = end is None and len(self.tokens[row]) < self._limit
            if self._on_tokens is not None and new[:end] and self._on_tokens(row, new[:end]):
                active[row] = False
        self.active = active


def check_prompts(config: ModelConfig, tokens: Prompts) -> list[np.ndarray]:
    """Return prompts as arrays of ids, or raise an InputError for what is none."""
    if not _is_row(tokens):
        kind = type(tokens).__name__
        raise InputError(f"prompt: expected token ids, got {kind}; encode the text first")
    several = len(tokens) > 0 and _is_row(tokens[0])
    prompts = []
    for number, given in enumerate(tokens if several else [tokens]):
        where = f"prompt {number}" if several else "prompt"
        prompts.append(prompt := _as_row(given, where))
        if prompt.size == 0:
            raise InputError(f"{where}: expected at least one token, got none; begin with BOS")
        try:
            check_token_ids(prompt, config.vocab_size)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    return prompts


def _is_row(given) -> bool:
    if isinstance(given, (np.ndarray, jax.Array)):
        return given.ndim > 0
    return isinstance(given, Sequence) and not isinstance(given, (str, bytes))


def _as_row(given, where: str) -> np.ndarray:
    try:
        row = np.asarray(given)
    except ValueError as error:  # lists of unequal lengths
        raise InputError(f"{where}: expected one row of ids, got lists within it") from error
    if row.ndim != 1:
        raise InputError(f"{where}: expected one row of ids, got shape {row.shape}")
    return row


def check_numbers(seed: int, **numbers: int) -> None:
    """Raise an InputError unless the seed is one and the other numbers are positive integers."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise InputError(f"{name}: expected an integer of at least 1, got {value!r}")
    if not isinstance(seed, (int, np.integer)) or not is_seed(seed):
        raise InputError(f"seed: expected {SEEDS}, got {seed!r}")


def _check_stop(config: ModelConfig, stop: int | Iterable[int]) -> frozenset[int]:
    """Return the stop ids."""
    ids = [stop] if isinstance(stop, (int, np.integer)) else list(stop)
    try:
        check_token_ids(ids, config.vocab_size)
    except InputError as error:
        raise InputError(f"stop: {error}") from error
    return frozenset(ids)


def cache_length(
    config: ModelConfig, prompts: list[np.ndarray], new: int, max_length: int | None = None
) -> int:
    """Return how many tokens of a row the cache is to hold.

    Raises:
      InputError: the prompts leave no room for so many new tokens.
    """
    longest, context = max(map(len, prompts)), config.max_position_embeddings
    room = context if max_length is None else max_length
    of = "max_position_embeddings" if max_length is None else "max_length"
    if new >= room:
        raise InputError(f"max_new_tokens: expected less than {of} = {room}, got {new}")
    if longest + new > room:
        raise InputError(
            f"prompt: expected at most {room - new} tokens, which leave room for {new} new ones in "
            f"{of} = {room}, got {longest}; shorten it, or ask for fewer new tokens"
        )
    if max_length is not None:
        return max_length
    return min(context, power_of_two_times(SMALLEST_CACHE, longest + new))


def _pad(prompts: list[np.ndarray], rows: int) -> tuple[np.ndarray, np.ndarray]:
    count = np.array([len(prompt) for prompt in prompts] + [0] * (rows - len(prompts)))
    padded = np.zeros((rows, count.max()), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    return padded, count
