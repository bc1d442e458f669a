"""Round to FP8 and FP4 under `jit`, to the values that `quant` stores, with gradients passed on.

Everything is exact arithmetic in float32, so that all devices agree, also those without narrow
types. Numbers below float32's smallest normal one, 2^-126, may become 0.

Source: fact sheet 2.7, 10.3 and, for the gradients, 5 and 13F.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dsv4_jax.quant import E8M0_BIAS, FP8, Format
from dsv4_jax.shapes import Array, Float, Int

FP8_FLOOR = 1e-4  # the least that a group of activations or keys is scaled for
TOKEN_BLOCK = 1, 128  # channels of a token that share a scale

MANTISSA_BITS, EXPONENT_BIAS = 23, 127  # of float32


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def straight_through(rounding: Callable[[Array], Array], x: Array) -> Array:
    """Return `rounding(x)`, of the dtype of x; its gradient is that of x itself."""
    return rounding(x)


@straight_through.defjvp
def _pass_on(rounding, primals, tangents):
    return straight_through(rounding, *primals), *tangents


def round_tokens(x: Float[Array, "*rows t d"]) -> Float[Array, "*rows t d"]:
    """Round activations to FP8, each token in groups of 128 channels, as FP8 products read them."""
    return straight_through(_round_tokens, x)


def _round_tokens(x: Array) -> Array:
    return round_blocks(x.astype(jnp.float32), FP8, TOKEN_BLOCK, FP8_FLOOR).astype(x.dtype)


def round_blocks(
    x: Float[Array, "*rows r c"], form: Format, block: tuple[int, int], floor: float = 0.0
) -> Float[Array, "*rows r c"]:
    """Round float32 matrices to codes under one power of two for each block.

    Args:
      block: rows and columns that share a scale; those at the ends may be smaller.
      floor: the least that a block is scaled for.
    """
    lead, shape = x.shape[:-2], x.shape[-2:]
    block = [min(max(size, 1), step) for size, step in zip(shape, block, strict=True)]
    missing = [(0, -size % step) for size, step in zip(shape, block, strict=True)]
    tiles = jnp.pad(x, (*((0, 0),) * len(lead), *missing))
    padded = tiles.shape[-2:]
    tiles = tiles.reshape(*lead, padded[0] // block[0], block[0], padded[1] // block[1], block[1])
    largest = jnp.max(jnp.abs(tiles), axis=(-3, -1), keepdims=True)
    rounded = nearest(tiles, form, scale_exponents(jnp.maximum(largest, floor), form))
    return rounded.reshape(*lead, *padded)[..., : shape[0], : shape[1]]


def scale_exponents(largest: Float[Array, "..."], form: Format) -> Int[Array, "..."]:
    """Return ceil(log2(largest / largest code)) of float32 numbers, the least that E8M0 holds.

    Between two powers of two the bits of a float32 count its values: no division is needed.
    """
    code = int(np.float32(form.largest).view(np.int32))
    step = 1 << MANTISSA_BITS
    exponents = (_bits(largest) - code + step - 1) >> MANTISSA_BITS
    return jnp.maximum(exponents, -E8M0_BIAS)


def nearest(
    x: Float[Array, "..."], form: Format, exponents: Int[Array, "..."] | int = 0
) -> Float[Array, "..."]:
    """Round float32 numbers to the nearest code times 2^exponents, ties to even codes.

    Magnitudes must not exceed the largest code times 2^exponents.
    """
    grid = ml_dtypes.finfo(form.codes)
    exponent = (_bits(x) >> MANTISSA_BITS & 0xFF) - EXPONENT_BIAS
    step = jnp.maximum(exponent, exponents + int(grid.minexp)) - int(grid.nmant)
    codes = jax.lax.round(times_power(x, -step), jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    return times_power(codes, step)


def times_power(x: Float[Array, "..."], exponents: Int[Array, "..."]) -> Float[Array, "..."]:
    """Return x * 2^exponents, in two steps, as the power alone may be beyond float32."""
    half = exponents >> 1
    return x * _power_of_two(half) * _power_of_two(exponents - half)


def _power_of_two(exponents: Int[Array, "..."]) -> Float[Array, "..."]:
    bits = (exponents + EXPONENT_BIAS) << MANTISSA_BITS
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _bits(x: Float[Array, "..."]) -> Int[Array, "..."]:
    return jax.lax.bitcast_convert_type(x, jnp.int32)
