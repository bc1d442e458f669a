"""Sizes of blocks, and arrays filled up to whole ones."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels.index_math import cdiv


def largest_block(length: int, most: int, unit: int) -> int:
    """Return the largest of most, most / 2, ... unit that divides length rounded up to units."""
    whole = cdiv(length, unit) * unit
    block = most
    while block > unit and whole % block:
        block //= 2
    return block


def power_of_two(size: int, least: int = 16) -> int:
    """Return the smallest power of two that is neither below `size` nor below `least`."""
    return max(least, 1 << (size - 1).bit_length())


def pad_axes(x: Array, multiples: dict[int, int], fill: int = 0) -> Array:
    """Fill axes up to multiples, given by axis."""
    missing = [-size % multiples.get(axis, 1) for axis, size in enumerate(x.shape)]
    if not any(missing):
        return x
    return jnp.pad(x, [(0, n) for n in missing], constant_values=fill)
