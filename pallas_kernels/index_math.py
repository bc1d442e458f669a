"""Arithmetic for indices that runs on integers, on traced values and on symbols alike.

Kernels compute grids, block indices, loop bounds and masks by functions of plain operators and of
these. `pallas_kernels.prove` evaluates the very same functions over symbols: for all shapes.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

Index = Any  # an int, a traced int32 or a `prove.Symbol`
Truth = Any  # a bool, a traced bool or a `prove.Condition`


@functools.singledispatch
def where(condition: Truth, a: Index, b: Index) -> Index:
    """Return a where the condition holds, else b; both are computed."""
    return jnp.where(condition, a, b)


@where.register
def _(condition: bool, a: Index, b: Index) -> Index:
    return a if condition else b


def minimum(a: Index, b: Index) -> Index:
    """Return the smaller of two."""
    return where(a < b, a, b)


def maximum(a: Index, b: Index) -> Index:
    """Return the larger of two."""
    return where(a > b, a, b)


@functools.singledispatch
def div(a: Index, b: int) -> Index:
    """Return a / b rounded down, for a from 0 on and b above 0.

    The operator // rounds down for a below 0, too, for which kernels have no instruction.
    """
    return jax.lax.div(a, jnp.int32(b))


@div.register
def _(a: int, b: int) -> int:
    return a // b


def mod(a: Index, b: int) -> Index:
    """Return what `div` leaves of a."""
    return a - div(a, b) * b


def cdiv(a: Index, b: int) -> Index:
    """Return a / b rounded up, for a from 0 on and b above 0."""
    return div(a + b - 1, b)
