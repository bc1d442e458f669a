"""Small states to save and restore."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

PLACE = {"identity": {"seed": 0}, "batches": {"next": [3, None, -1]}}


def new_state(step: int) -> dict:
    """Return a state that is another one at each step."""
    return {
        "step": jnp.array(step, jnp.int32),
        "weight": jax.random.normal(jax.random.key(step), (256, 256)),
        "half": jnp.ones((8, 16), jnp.bfloat16) * step,
        "table": jnp.arange(12, dtype=jnp.int32).reshape(4, 3),
    }


def shapes_of(state: dict, shardings=None) -> dict:
    """Return the shapes and dtypes of a state, placed as it is or as given."""
    if shardings is None:
        shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state, shardings,
    )


def assert_same(found, expected) -> None:
    """Compare two trees bit by bit."""
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for value, wanted in leaves:
        np.testing.assert_array_equal(value, wanted)
        assert value.dtype == wanted.dtype
