"""A kernel at a shape of a released model: to be compiled for devices, and timed on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax


class Case(NamedTuple):
    """One call of an operation."""

    operation: str
    name: str
    run: Callable  # from an implementation to a function of the arguments
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    flops: float  # that the result needs, not those that a kernel spends
    bytes: float  # read and written at least
    covered: bool = False  # another case has the same kernels at the same shapes
