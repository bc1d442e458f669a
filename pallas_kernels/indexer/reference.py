"""What the kernels of the lightning indexer compute, in plain JAX: every score written out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.indexer.keys import decoded, is_packed


def scores(
    queries: Float[Array, "b t i j"], head_weights: Float[Array, "b t i"],
    keys: Float[Array, "b c j"],
) -> Float[Array, "b t c"]:
    """Return I_{t,c} = sum_i w_{t,i} relu(q_{t,i} . k_c), float32.

    Source: report 2.3.1; fact sheet 2.6.
    """
    hits = jnp.einsum("btij,bcj->btic", queries, keys, preferred_element_type=jnp.float32)
    return jnp.einsum("btic,bti->btc", jax.nn.relu(hits), head_weights.astype(jnp.float32))


def select(
    queries: Float[Array, "b t i j"], head_weights: Float[Array, "b t i"],
    keys: Float[Array, "b c j"], first: Int[Array, "b t"], end: Int[Array, "b t"], topk: int, *,
    rounded: bool = False,
) -> Int[Array, "b t l"]:
    """Return the numbers of the best `topk` entries from `first` to before `end`, ascending.

    Of equal scores the lowest number is better. Where there are fewer, the rest are -1.

    Args:
      rounded: compare scores rounded to bfloat16.
    """
    number = jnp.arange(keys.shape[1])
    seen = (number >= first[..., None]) & (number < end[..., None])
    found = scores(queries, head_weights, keys)
    if rounded:
        found = jax.lax.reduce_precision(found, exponent_bits=8, mantissa_bits=7)
    found = jnp.where(seen, jnp.where(found == 0, 0.0, found), -jnp.inf)  # -0 ties with 0
    kept = min(topk, number.size)
    best, index = jax.lax.top_k(found, kept)
    ordered = jnp.sort(jnp.where(best > -jnp.inf, index, number.size), axis=-1)
    ordered = jnp.where(ordered < number.size, ordered, -1)
    return jnp.pad(ordered, ((0, 0), (0, 0), (0, topk - kept)), constant_values=-1)


def select_stored(
    queries: Float[Array, "b t i j"], head_weights: Float[Array, "b t i"],
    stored: Array, layer: Int[Array, ""], end: Int[Array, "b t"], topk: int,
) -> Int[Array, "b t l"]:
    """Do as `select` with one layer's keys of a cache [z, b, c, stored width]."""
    keys = decoded(stored[layer], queries.shape[3], queries.dtype)
    return select(
        queries, head_weights, keys, jnp.zeros_like(end), end, topk, rounded=is_packed(stored)
    )
