"""Read tokens into a cache: prompts in chunks, then token by token, or with a draft of the next.

All functions are jitted; they take over the cache that they are given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.cache import Cache, MTPCache, Span, StackedCache
from dsv4_jax.chunks import power_of_two_times
from dsv4_jax.compiler import inference_options
from dsv4_jax.config import ModelConfig, Runtime
from dsv4_jax.model import Transformer, describe_span
from dsv4_jax.mtp import MultiTokenPrediction
from dsv4_jax.sampling import draw_tokens
from dsv4_jax.shapes import Array, Bool, Float, Int, Streams, Tokens

# XLA on CPU multiplies up to about 50 rows by another kernel, which rounds differently: every
# chunk has more, whatever the batch.
SMALLEST_CHUNK = 64
CHUNK = 1024  # tokens of a row that are read at once, unless another number is asked for


def prefill(
    config: ModelConfig, runtime: Runtime, params: dict, cache: Cache, tokens: np.ndarray,
    count: np.ndarray, *, chunk: int = CHUNK,
) -> tuple[Float[Array, "b v"], Cache]:
    """Read tokens after those that the cache has read.

    Memory beside the cache and the weights grows with `chunk`, not with the number of tokens; where
    kernels run, they need a layer's entries decoded, too.

    Args:
      tokens: ids [b, t] in [0, vocab_size).
      count: how many of each row are tokens, from the first; [b].
      chunk: tokens of a row that are read at once; rounded up to 64 times a power of two, or to
        the window times one where that is longer.
    Returns:
      The logits after each row's last token, 0 for rows without one, and the cache.
    """
    size = chunk_size(config, min(chunk, tokens.shape[1]))
    logits = jnp.zeros((tokens.shape[0], config.vocab_size), jnp.float32)
    for first in range(0, max(1, tokens.shape[1]), size):
        part = np.zeros((tokens.shape[0], size), np.int32)
        piece = tokens[:, first : first + size]
        part[:, : piece.shape[1]] = piece
        here = np.clip(count - first, 0, size).astype(np.int32)
        logits, cache = _jitted(_read)(config, runtime, params, cache, logits, part, here)
    return logits, cache


def chunk_size(config: ModelConfig, tokens: int) -> int:
    """Return the size of chunk that so many tokens are read in: all sizes round alike."""
    return power_of_two_times(max(SMALLEST_CHUNK, config.sliding_window), tokens)


def decode_step(
    config: ModelConfig, runtime: Runtime, params: dict, cache: Cache, tokens: Int[Array, " b"],
    active: Bool[Array, " b"],
) -> tuple[Float[Array, "b v"], Cache]:
    """Read one token of each active row; return the logits of the next, and the cache."""
    return _jitted(_decode)(config, runtime, params, cache, tokens, active)


class Turn(NamedTuple):
    """Where a generation stands."""

    cache: Cache
    token: Int[Array, " b"]  # drawn and not read yet
    draft: Int[Array, " b"] | None  # what may follow it


class Drawn(NamedTuple):
    """What one step has drawn."""

    tokens: Int[Array, "b s"]
    count: Int[Array, " b"]  # how many of each row's are meant


class Draws(NamedTuple):
    """What chance depends on."""

    keys: Array  # [b], of the rows
    sampling: Float[Array, " 2"]  # temperature and top_p


def first_turn(
    config: ModelConfig, runtime: Runtime, params: dict, cache: Cache,
    logits: Float[Array, "b v"], draws: Draws, *, kind: str,
) -> Turn:
    """Draw the token after a prompt, and its draft if the cache keeps what drafting needs."""
    return _jitted(_first_turn, "kind")(config, runtime, params, cache, logits, draws, kind=kind)


def next_turn(
    config: ModelConfig, runtime: Runtime, params: dict, turn: Turn, active: Bool[Array, " b"],
    draws: Draws, *, kind: str,
) -> tuple[Turn, Drawn]:
    """Read the token of each active row, and its draft if there is one; draw what follows.

    A draft that is what the model itself draws after the token is accepted, and the token after
    it is drawn in the same step. A draft that is not is forgotten. Drafts are drawn by the chance
    that the model's own draw will have, so that alike predictions give the same token at any
    temperature.
    """
    step = _plain_turn if turn.draft is None else _drafted_turn
    return _jitted(step, "kind")(config, runtime, params, turn, active, draws, kind=kind)


@functools.cache
def _jitted(function: Callable, *static: str) -> Callable:
    """Compile a step; the argument after the parameters, which has the cache, is taken over."""
    return jax.jit(
        function, static_argnums=(0, 1), static_argnames=static, donate_argnums=3,
        compiler_options=inference_options(),
    )


def _read(config, runtime, params, cache: Cache, logits, tokens, count):
    """Read one chunk; replace the logits of rows that have tokens in it."""
    features, read = _extend(config, runtime, params, cache, tokens, count)
    last = jnp.maximum(count - 1, 0)[:, None]
    hidden = jnp.take_along_axis(features.hidden, last[..., None], axis=1)
    new = _logits(params, hidden)[:, 0]
    if cache.mtp is not None:
        before = jnp.concatenate([cache.mtp.streams[:, None], features.streams[:, :-1]], axis=1)
        # Slot i joins the streams of token i and token i + 1. A row's first token has none before
        # it: its slot has position -1, which no query sees.
        span = Span(cache.length - 1, count)
        _, layer = _draft(config, runtime, params, cache, before, tokens, span)
        streams = jnp.take_along_axis(features.streams, last[..., None, None], axis=1)[:, 0]
        streams = jnp.where((count > 0)[:, None, None], streams, cache.mtp.streams)
        read = read._replace(mtp=MTPCache(layer, streams))
    return jnp.where((count > 0)[:, None], new, logits), read


def _decode(config, runtime, params, cache: Cache, tokens, active):
    features, cache = _extend(config, runtime, params, cache, tokens[:, None], active)
    return _logits(params, features.hidden)[:, 0], cache


def _first_turn(config, runtime, params, cache: Cache, logits, draws: Draws, *, kind: str) -> Turn:
    token = draw_tokens(draws.keys, cache.length, logits, draws.sampling, kind=kind)
    if cache.mtp is None:
        return Turn(cache, token, None)
    span = Span(cache.length - 1, jnp.ones_like(cache.length))
    logits, layer = _draft(
        config, runtime, params, cache, cache.mtp.streams[:, None], token[:, None], span
    )
    cache = cache._replace(mtp=cache.mtp._replace(layer=layer))
    draft = draw_tokens(draws.keys, cache.length + 1, logits[:, 0], draws.sampling, kind=kind)
    return Turn(cache, token, draft)


def _plain_turn(config, runtime, params, turn: Turn, active, draws: Draws, *, kind: str):
    logits, cache = _decode(config, runtime, params, turn.cache, turn.token, active)
    token = draw_tokens(draws.keys, cache.length, logits, draws.sampling, kind=kind)
    return Turn(cache, token, None), Drawn(token[:, None], active.astype(jnp.int32))


def _drafted_turn(config, runtime, params, turn: Turn, active, draws: Draws, *, kind: str):
    start, active = turn.cache.length, active.astype(jnp.int32)
    tokens = jnp.stack([turn.token, turn.draft], axis=1)
    features, cache = _extend(config, runtime, params, turn.cache, tokens, 2 * active)
    logits = _logits(params, features.hidden)
    drawn = jnp.stack([
        draw_tokens(draws.keys, start + 1 + i, logits[:, i], draws.sampling, kind=kind)
        for i in range(2)
    ], axis=1)
    accepted = (drawn[:, 0] == turn.draft).astype(jnp.int32)
    count = (1 + accepted) * active
    # The model has read a token too many where the draft was wrong: its row forgets it.
    cache = cache._replace(length=start + count)
    logits, layer = _draft(
        config, runtime, params, cache, features.streams, drawn, Span(start, count)
    )

    def last(x):
        return jax.vmap(lambda row, i: row[i])(x, accepted)

    streams = jnp.where(active[:, None, None] > 0, last(features.streams), cache.mtp.streams)
    cache = cache._replace(mtp=MTPCache(layer, streams))
    draft = draw_tokens(
        draws.keys, start + 2 + accepted, last(logits), draws.sampling, kind=kind
    )
    return Turn(cache, last(drawn), draft), Drawn(drawn, count)


def _extend(config, runtime, params, cache: Cache, tokens: Tokens, count):
    model = Transformer(config, runtime)
    count = count.astype(jnp.int32)
    return model.apply({"params": params}, tokens, count, cache, method="extend")


def _draft(
    config, runtime, params, cache: Cache, streams: Streams, after: Tokens, span: Span
) -> tuple[Float[Array, "b t v"], object]:
    """Run the prediction block on streams and the tokens after theirs.

    Returns the logits of the tokens after those, and the block's cache.
    """
    block = MultiTokenPrediction(config, runtime)
    embedded = params["embedding"][after].astype(streams.dtype)
    stacked = StackedCache(cache.mtp.layer, jnp.int32(0))
    hidden, _, layer = block.apply(
        {"params": params["mtp"]}, streams, embedded, describe_span(config, after, span), stacked
    )
    return _logits(params, hidden), layer


def _logits(params, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
    head = params["head"].astype(hidden.dtype)
    return jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
