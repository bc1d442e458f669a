"""What a kernel costs, told to the compiler: it then knows what may run beside the kernel."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


def estimate(flops: float, *arrays) -> pl.CostEstimate:
    """Return the cost of a kernel.

    Args:
      flops: of its products, a multiply-add counting two.
      arrays: trees of arrays, or of shapes with dtypes, each read or written once.
    """
    leaves = jax.tree.leaves(arrays, is_leaf=lambda leaf: hasattr(leaf, "dtype"))
    traffic = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in leaves)
    return pl.CostEstimate(flops=int(flops), bytes_accessed=int(traffic), transcendentals=0)
