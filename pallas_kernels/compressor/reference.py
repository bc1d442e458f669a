"""What the kernels of the compressor compute, in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def pooled_entries(
    values: Float[Array, "b t u k"], gates: Float[Array, "b t u k"],
    bias: Float[Array, "ratio u k"], norm: Float[Array, " k"], start: Int[Array, "b c"],
    has_previous: Bool[Array, "b c"], eps: float,
) -> Float[Array, "b c k"]:
    """Return the normalised average of each entry's tokens, weighted by softmax(gates + bias).

    The softmax is of each channel, over the tokens of the entry's block. With two series (u = 2)
    it is over series 0 of the block before, where there is one, and series 1 of the entry's own.
    """
    ratio, series = bias.shape[:2]
    rows = jnp.arange(values.shape[0])[:, None, None]
    own = start[..., None] + jnp.arange(ratio)

    def block(x, tokens, u, fill=0.0):
        return x[rows, tokens, u].astype(jnp.float32) + fill

    taken = [block(values, own, series - 1)]
    weighed = [block(gates, own, series - 1, bias[:, -1])]
    if series == 2:
        before = jnp.maximum(own - ratio, 0)
        there = has_previous[..., None, None]
        taken.append(block(values, before, 0))
        weighed.append(jnp.where(there, block(gates, before, 0, bias[:, 0]), -jnp.inf))
    weights = jax.nn.softmax(jnp.concatenate(weighed, axis=2), axis=2)
    pooled = jnp.sum(weights * jnp.concatenate(taken, axis=2), axis=2)
    mean = jnp.mean(pooled * pooled, axis=-1, keepdims=True)
    return pooled * jax.lax.rsqrt(mean + eps) * norm
