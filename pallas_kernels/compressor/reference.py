"""What the kernels of the compressor compute, in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.rounding import round_entries


def compress(
    values: Float[Array, "b t u k"], gates: Float[Array, "b t u k"],
    bias: Float[Array, "ratio u k"], norm: Float[Array, " k"], cos: Float[Array, "b c h"],
    sin: Float[Array, "b c h"], start: Int[Array, "b c"], has_previous: Bool[Array, "b c"],
    eps: float, dtype, rounded: bool,
) -> Float[Array, "b c k"]:
    """Return the normalised, rotated average of each entry's tokens, rounded to FP8 if wanted."""
    pooled = pool(values, gates, bias, start, has_previous)
    mean = jnp.mean(pooled * pooled, axis=-1, keepdims=True)
    entries = (pooled * jax.lax.rsqrt(mean + eps) * norm).astype(dtype)
    entries = rotate(entries, cos, sin)
    return round_entries(entries, 2 * cos.shape[-1]) if rounded else entries


def pool(
    values: Float[Array, "b t u k"], gates: Float[Array, "b t u k"],
    bias: Float[Array, "ratio u k"], start: Int[Array, "b c"], has_previous: Bool[Array, "b c"],
) -> Float[Array, "b c k"]:
    """Return the average of each entry's tokens, weighted by softmax(gates + bias).

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
    return jnp.sum(weights * jnp.concatenate(taken, axis=2), axis=2)


def rotate(
    x: Float[Array, "b c k"], cos: Float[Array, "b c h"], sin: Float[Array, "b c h"]
) -> Float[Array, "b c k"]:
    """Rotate the last pairs of channels: (a, b) -> (a cos - b sin, a sin + b cos), in float32."""
    plain, turned = jnp.split(x, [x.shape[-1] - 2 * cos.shape[-1]], axis=-1)
    a, b = (turned[..., i::2].astype(jnp.float32) for i in (0, 1))
    pairs = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return jnp.concatenate([plain, pairs.reshape(turned.shape).astype(x.dtype)], axis=-1)
