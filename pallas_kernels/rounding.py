"""Rounding to FP8, by arithmetic on float32 that every device does alike.

Groups of channels share a power of two, the least that brings them into the range of the codes.
Conversions to FP8 or bfloat16 and back would not do: XLA leaves such a pair out on GPU.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.blocks import pad_axes

MANTISSA, BIAS = 23, 127  # of float32
SIGN = -(2**31)


class Codes(NamedTuple):
    """Numbers of few bits, and how they are scaled."""

    group: int  # channels that share a scale
    mantissa: int  # bits
    least: int  # exponent of the smallest normal code
    largest: float
    floor: float  # the least magnitude that a group is scaled for


E4M3 = Codes(64, 3, -6, 448.0, 1e-4)


def round_plain(x: Float[Array, "*s k"], codes: Codes) -> Float[Array, "*s k"]:
    """Round float32 channels in groups, of which the last may be smaller."""
    k = x.shape[-1]
    groups = pad_axes(x, {x.ndim - 1: codes.group}).reshape(*x.shape[:-1], -1, codes.group)
    largest = jnp.max(jnp.abs(groups), axis=-1, keepdims=True)
    rounded = nearest(groups, largest, codes)
    return rounded.reshape(*x.shape[:-1], rounded.shape[-2] * codes.group)[..., :k]


def nearest(
    x: Float[Array, "*s k"], largest: Float[Array, "*s n"], codes: Codes
) -> Float[Array, "*s k"]:
    """Round float32 numbers to the nearest codes times their scale, ties to even codes.

    Args:
      largest: magnitude in the group of each number.
    """
    # Between two powers of two the bits of a float32 count its values.
    code = int(np.float32(codes.largest).view(np.int32))
    scale = (_bits(jnp.maximum(largest, codes.floor)) - code + (1 << MANTISSA) - 1) >> MANTISSA
    bits = _bits(x * _power(-scale))
    exponent = jnp.maximum((bits >> MANTISSA & 255) - BIAS, codes.least)
    # A sum with so large a number keeps multiples of the codes' distance, and rounds ties to even.
    large = _power(exponent - codes.mantissa + MANTISSA)
    size = (_number(bits & ~SIGN) + large) - large
    return _number(_bits(size) | (bits & SIGN)) * _power(scale)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def round_entries(x: Float[Array, "*s k"], rotated: int) -> Float[Array, "*s k"]:
    """Round entries to FP8, save the rotated channels, which are last, to bfloat16.

    The gradient is that of x itself.
    """
    plain, turned = jnp.split(x, [x.shape[-1] - rotated], axis=-1)
    plain = round_plain(plain.astype(jnp.float32), E4M3).astype(x.dtype)
    return jnp.concatenate([plain, _to_bfloat16(turned)], axis=-1)


@round_entries.defjvp
def _pass_on(rotated, primals, tangents):
    return round_entries(*primals, rotated), *tangents


def _to_bfloat16(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _bits(x: Float[Array, "*s"]) -> Int[Array, "*s"]:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _number(bits: Int[Array, "*s"]) -> Float[Array, "*s"]:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _power(exponents: Int[Array, "*s"]) -> Float[Array, "*s"]:
    return _number((exponents + BIAS) << MANTISSA)
