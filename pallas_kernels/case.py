"""A kernel at a shape of a released model: to be compiled for devices, and timed on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
    """One call of an operation."""

    operation: str
    name: str
    run: Callable  # from an implementation to a function of the arguments
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    flops: float  # that the result needs, not those that a kernel spends
    bytes: float  # read and written at least
    slots: float = 1.0  # FLOPs of all slots, masked ones too, by those that are needed
    covered: bool = False  # another case has the same kernels, with the same blocks
    # From a random generator to the arguments that are not to be normal numbers, by their place
    # among all leaves.
    special: Callable[[np.random.Generator], dict[int, np.ndarray]] = lambda rng: {}

    def make_arguments(self, seed: int):
        """Return arrays to call it with."""
        leaves, tree = jax.tree.flatten(self.arguments)
        special, key = self.special(np.random.default_rng(seed)), jax.random.key(seed)
        arrays = [
            jnp.asarray(special[i], x.dtype) if i in special
            else jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
            for i, x in enumerate(leaves)
        ]
        return jax.tree.unflatten(tree, arrays)
