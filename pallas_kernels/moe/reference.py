"""What the kernels of routed experts compute, in plain JAX."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.moe.swiglu import clamped_swiglu


def routed_experts(
    x: Float[Array, "t d"], experts: Int[Array, "t a"], weights: Float[Array, "t a"],
    gate: Float[Array, "e d f"], up: Float[Array, "e d f"], down: Float[Array, "e f d"], *,
    limit: float, between: Callable | None = None,
) -> Float[Array, "t d"]:
    """Return the weighted sum of each token's experts, float32.

    Every expert computes every token: a definition, not a fast way.

    Args:
      between: changes the hidden layer [t, f] before the last product.
    """
    x32 = x.astype(jnp.float32)

    def add(total, expert):
        number, *matrices = expert
        gate, up, down = (matrix.astype(jnp.float32) for matrix in matrices)
        share = jnp.sum(jnp.where(experts == number, weights.astype(jnp.float32), 0.0), axis=1)
        hidden = clamped_swiglu(x32 @ gate, x32 @ up, limit) * share[:, None]
        return total + (between(hidden) if between else hidden) @ down, None

    numbered = (jnp.arange(gate.shape[0]), gate, up, down)
    total, _ = jax.lax.scan(jax.checkpoint(add), jnp.zeros(x.shape, jnp.float32), numbered)
    return total
