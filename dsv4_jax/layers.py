"""Projection, normalisation and activation shared by all parts of the model."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.config import PLAIN, Runtime
from dsv4_jax.rounding import round_tokens
from dsv4_jax.shapes import Array, Float

# XLA on CPU, with jax 0.12, has two kernels for products by up to 8 columns, which round unlike;
# the number of rows decides between them.
LEAST_COLUMNS = 9


def project(
    form: str, x: Float[Array, "..."], w: Float[Array, "..."], runtime: Runtime, **options
) -> Array:
    """Multiply tokens by a matrix in their dtype; the result ends with the last axis of w.

    Args:
      form: of the `jnp.einsum` that this is, with its options.
      runtime: if `batch_invariant`, a token has the same bits whatever the number of tokens.
    """
    w, columns = w.astype(x.dtype), w.shape[-1]
    if not runtime.batch_invariant or columns >= LEAST_COLUMNS:
        return jnp.einsum(form, x, w, **options)
    w = jnp.pad(w, [(0, 0)] * (w.ndim - 1) + [(0, LEAST_COLUMNS - columns)])
    return jnp.einsum(form, x, w, **options)[..., :columns]


def linear(
    form: str, x: Float[Array, "..."], w: Float[Array, "..."], runtime: Runtime, **options
) -> Array:
    """Multiply tokens by a matrix that checkpoints store in FP8: `project`, with rounded tokens.

    Args:
      form: the axes of x that it sums over are the last ones, in the order of the matrix's columns.
    """
    if runtime.linears != PLAIN:
        axes, _, out = form.replace("->", ",").split(",")
        kept = sum(axis in out for axis in axes)
        x = round_tokens(x.reshape(*x.shape[:kept], -1)).reshape(x.shape)
    return project(form, x, w, runtime, **options)


def rms_norm(
    x: Float[Array, "*rows d"], weight: Float[Array, " d"] | None = None, *, eps: float
) -> Float[Array, "*rows d"]:
    """Divide rows by their root mean square: x * rsqrt(mean(x^2) + eps) * weight.

    Computed in float32 and cast once, at the end, to the dtype of x.
    """
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (y if weight is None else y * weight).astype(x.dtype)


def clamped_swiglu(
    gate: Float[Array, "*rows f"], up: Float[Array, "*rows f"], limit: float
) -> Float[Array, "*rows f"]:
    """Return silu(min(gate, limit)) * clip(up, -limit, limit), computed in float32.

    Source: report 4.2.3 (SwiGLU clamping), used in routed and shared experts alike.
    """
    gate32, up32 = gate.astype(jnp.float32), up.astype(jnp.float32)
    y = jax.nn.silu(jnp.minimum(gate32, limit)) * jnp.clip(up32, -limit, limit)
    return y.astype(gate.dtype)
