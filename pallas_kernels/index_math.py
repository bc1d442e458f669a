"""Arithmetic for indices that runs on integers, on traced values and on symbols alike.

Kernels compute grids, block indices, loop bounds and masks by functions of plain operators and of
these. `pallas_kernels.prove` evaluates the very same functions over symbols: for all shapes.
"""

from __future__ import annotations

import functools
from typing import Any

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


def cdiv(a: Index, b: int) -> Index:
    """Return a / b rounded up, for b above 0."""
    return (a + b - 1) // b
