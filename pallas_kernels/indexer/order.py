"""The order of scores as integers, in which a threshold is found bit by bit, and their rounding."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

BITS = 32
NONE = -(2**31)  # stands for no score at all: below every number's


def sortable(scores: Float[Array, "*s"]) -> Int[Array, "*s"]:
    """Map float32 to int32 of the same order; -0 and 0 become one."""
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(2**31 - 1), bits)


def to_bfloat16(scores: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Round to bfloat16, ties to even, but stay float32.

    By integers: XLA may leave out a conversion to bfloat16 and back.
    """
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    upper = (bits + 0x7FFF + (bits >> 16 & 1)) & ~0xFFFF
    return jax.lax.bitcast_convert_type(upper, jnp.float32)


def threshold(count: Callable[[Array], Array], topk: int, zeros: Int[Array, "*s"]) -> Array:
    """Return the largest integer that at least `topk` of others reach; NONE if there are fewer.

    Args:
      count: from a candidate to how many reach it.
      zeros: of a candidate's shape.
    """

    def raise_bit(i, found):
        candidate = found | (jnp.int32(1) << (BITS - 1 - i))
        return jnp.where(count(candidate ^ NONE) >= topk, candidate, found)

    # Found without the sign, whose bit is the first to be decided.
    return jax.lax.fori_loop(0, BITS, raise_bit, zeros) ^ NONE


def tie_bound(
    count_below: Callable[[Array], Array], free: Array, bits: int, zeros: Int[Array, "*s"]
) -> Array:
    """Return the largest number of `bits` bits below which there are at most `free` equal scores.

    Args:
      count_below: from a candidate to how many entries with the threshold's score come before it.
      zeros: of a candidate's shape.
    """

    def raise_bit(i, bound):
        candidate = bound | (jnp.int32(1) << (bits - 1 - i))
        return jnp.where(count_below(candidate) <= free, candidate, bound)

    return jax.lax.fori_loop(0, bits, raise_bit, zeros)
