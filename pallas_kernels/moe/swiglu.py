"""The hidden layer of an expert and its gradient, elementwise; kernels and reference share them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def clamped_swiglu(
    gate: Float[Array, "*s f"], up: Float[Array, "*s f"], limit: float
) -> Float[Array, "*s f"]:
    """Return silu(min(gate, limit)) * clip(up, -limit, limit), for float32."""
    held = jnp.minimum(gate, limit)
    return held * jax.lax.logistic(held) * jnp.clip(up, -limit, limit)


def swiglu_gradients(
    gate: Float[Array, "*s f"], up: Float[Array, "*s f"], grad: Float[Array, "*s f"], limit: float
) -> tuple[Float[Array, "*s f"], Float[Array, "*s f"]]:
    """Return the gradients of `clamped_swiglu`; beyond a clamp they are 0."""
    held, bounded = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    sigmoid = jax.lax.logistic(held)
    slope = sigmoid * (1.0 + held * (1.0 - sigmoid))
    grad_gate = jnp.where(gate < limit, grad * bounded * slope, 0.0)
    return grad_gate, jnp.where(jnp.abs(up) < limit, grad * held * sigmoid, 0.0)


def rounded(x: Float[Array, "*s f"], limit: float, dtype) -> Float[Array, "*s f"]:
    """Round float32 to dtype without crossing a clamp, where the gradient would jump."""
    below, above = _beside(limit, np.dtype(dtype))
    near = x.astype(dtype).astype(jnp.float32)
    outside = jnp.where(x > 0.0, jnp.maximum(near, above), jnp.minimum(near, -above))
    return jnp.where(jnp.abs(x) < limit, jnp.clip(near, -below, below), outside).astype(dtype)


def _beside(limit: float, dtype: np.dtype) -> tuple[float, float]:
    """Return the largest number below the limit that dtype has and the smallest from it on."""
    near = np.asarray(limit, dtype)
    below = near if near < limit else np.nextafter(near, np.asarray(-np.inf, dtype))
    above = near if near >= limit else np.nextafter(near, np.asarray(np.inf, dtype))
    return float(below), float(above)
