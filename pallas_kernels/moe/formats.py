"""FP4 weights and FP8 tokens: their values, by arithmetic that kernels can do too.

A matrix [out, in] is stored as E2M1 codes, two in a byte along `in` with the even column in the low
half, and an E8M0 scale, 2^(byte - 127), for each 32 of them. To spare a kernel from interleaving
these halves, what is multiplied with them has its even columns first, then the odd ones.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels import codes as codes_of
from pallas_kernels.blocks import pad_axes
from pallas_kernels.codes import BYTES, powers
from pallas_kernels.rounding import E4M3, round_plain

TOKENS = E4M3._replace(group=128)  # channels of a token that share one


class Fp4(NamedTuple):
    """The matrices of all experts."""

    codes: UInt8[Array, "e out in/2"]
    scales: UInt8[Array, "e out in/32"]


def decode(
    codes: UInt8[Array, "*s n"], scales: Float[Array, "*s n"], dtype
) -> tuple[Float[Array, "*s n"], Float[Array, "*s n"]]:
    """Return the values of even and of odd columns: exact in bfloat16."""
    values = codes_of.halves(codes.astype(jnp.int32))
    return tuple((half * scales).astype(dtype) for half in values)


def decoded(matrices: Fp4) -> Float[Array, "e out in"]:
    """Return all values in float32."""
    scales = jnp.repeat(powers(matrices.scales), BYTES, axis=-1)
    halves = decode(matrices.codes, scales, jnp.float32)
    return jnp.stack(halves, axis=-1).reshape(*scales.shape[:-1], -1)


def halves(x: Float[Array, "n k"], unit: int) -> Float[Array, "n l"]:
    """Put even columns before odd ones, each filled up to a multiple of `unit`."""
    return jnp.concatenate([pad_axes(x[:, k::2], {1: unit}) for k in (0, 1)], axis=1)


@jax.custom_jvp
def round_tokens(x: Float[Array, "n k"]) -> Float[Array, "n k"]:
    """Round to FP8 (E4M3) under the least power of two that fits each group of channels.

    The gradient is that of x itself.
    """
    return round_plain(x.astype(jnp.float32), TOKENS).astype(x.dtype)


@round_tokens.defjvp
def _pass_on(primals, tangents):
    return round_tokens(*primals), *tangents
