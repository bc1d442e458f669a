"""What the kernels of Newton-Schulz iterations compute, in plain JAX."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def symmetric_product(
    x: Float[Array, "z n m"], add: Float[Array, "z n n"] | None = None, *,
    scale: float = 1.0, add_scale: float = 0.0,
) -> Float[Array, "z n n"]:
    """Return scale x x^T + add_scale add, summed in float32, in the dtype of x."""
    product = scale * jnp.einsum("znm,zkm->znk", x, x, preferred_element_type=jnp.float32)
    if add is not None:
        product += add_scale * add.astype(jnp.float32)
    return product.astype(x.dtype)
