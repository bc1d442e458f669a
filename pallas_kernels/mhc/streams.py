"""The arithmetic of streams, as kernels do it: on pieces [tokens, columns] of each, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.mhc.gates import Matrix, Vectors
from pallas_kernels.target import CPU, target_platform

Pieces = list[Array]  # one for each stream


def expand(xs: Pieces, y: Array, post: Vectors, comb: Matrix) -> Pieces:
    """Return X'_m = post_m y + sum_n comb[n, m] X_n; a gate is [tokens, 1]."""
    return [
        sum((row[m] * x for row, x in zip(comb, xs, strict=True)), post[m] * y)
        for m in range(len(xs))
    ]


def expand_gradient(grads: Pieces, post: Vectors, comb: Matrix) -> tuple[Pieces, Array]:
    """Return the gradients of `expand` in streams and y."""
    in_xs = [sum(a * g for a, g in zip(row, grads, strict=True)) for row in comb]
    return in_xs, sum(a * g for a, g in zip(post, grads, strict=True))


def weighted_sum(gates: Vectors, xs: Pieces) -> Array:
    """Return sum_n gate_n X_n."""
    return sum(gate * x for gate, x in zip(gates, xs, strict=True))


def split(x: Array, parts: int) -> list[Array]:
    """Return bfloat16 values whose sum is x: two of 8 bits each, or three, which is all of it.

    Bits are cut off, not rounded: a compiler may take a float32 that is rounded to bfloat16 and
    widened again for the float32 itself.
    """
    values = []
    for _ in range(parts):
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(2**16))
        high = jax.lax.bitcast_convert_type(bits, jnp.float32)
        values.append(high.astype(jnp.bfloat16))
        x = x - high
    return values


def for_product(x: Array) -> Array:
    """Return a factor as the platform takes it: CPUs want float32 for some layouts of bfloat16."""
    return x.astype(jnp.float32) if target_platform() == CPU else x
