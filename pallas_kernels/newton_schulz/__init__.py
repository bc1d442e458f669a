"""Products of a matrix with its own transpose, which Newton-Schulz iterations are made of.

Such a product is symmetric: the kernels compute one triangle of it, half of the operations.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.implementation import AUTO, XLA, choose
from pallas_kernels.newton_schulz import gpu, reference, tpu

# Below this a product is so short that the halved work does not show.
WORTHWHILE = 512
DTYPES = ("bfloat16", "float32")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def symmetric_product(
    x: Float[Array, "z n m"], add: Float[Array, "z n n"] | None = None,
    scale: float = 1.0, add_scale: float = 0.0, implementation: str = AUTO,
) -> Float[Array, "z n n"]:
    """Return scale x x^T + add_scale add, summed in float32, in the dtype of x.

    Args:
      add: a symmetric matrix for each of the stack: of its tiles one triangle is read.
    Raises:
      ValueError: there is no such implementation.
    """
    worthwhile = min(x.shape[1:]) >= WORTHWHILE and x.dtype.name in DTYPES
    chosen = choose("newton_schulz", implementation, worthwhile=worthwhile)
    if chosen != XLA and x.dtype.name not in DTYPES:
        raise ValueError(
            f"newton_schulz: expected x in {' or '.join(DTYPES)}, got {x.dtype.name}"
        )
    product = reference if chosen == XLA else {"gpu": gpu, "tpu": tpu}[chosen]
    return product.symmetric_product(x, add, scale=scale, add_scale=add_scale)


def _forward(x, add, scale, add_scale, implementation):
    return symmetric_product(x, add, scale, add_scale, implementation), (x, add)


def _backward(scale, add_scale, implementation, kept, grad):
    x, add = kept
    both = (grad + grad.mT).astype(jnp.float32)
    grad_x = scale * jnp.einsum("znk,zkm->znm", both, x, preferred_element_type=jnp.float32)
    return grad_x.astype(x.dtype), None if add is None else (add_scale * grad).astype(add.dtype)


symmetric_product.defvjp(_forward, _backward)
