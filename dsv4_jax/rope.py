"""Rotary position embedding: interleaved, partial, with YaRN in compressed layers."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dsv4_jax.config import WINDOW, ModelConfig
from dsv4_jax.shapes import Array, Float, Int


class Rotation(NamedTuple):
    """Cosine and sine of the angle of each pair of channels, float32."""

    cos: Float[Array, "b t half"]
    sin: Float[Array, "b t half"]


def frequencies(config: ModelConfig, kind: str) -> np.ndarray:
    """Return the angle per position of each channel pair in layers of an attention kind.

    f_i = theta^(-2i / width) in window layers. In CSA and HCA layers frequencies that turn less
    than beta_slow times over the original context are divided by the YaRN factor, those that
    turn more than beta_fast times are kept, and a linear ramp joins the two.

    Source: fact sheet 2.3 and 13 A.
    """
    width = config.qk_rope_head_dim
    theta = config.rope_theta if kind == WINDOW else config.compress_rope_theta
    freqs = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    if kind == WINDOW or config.yarn_factor == 1:
        return freqs.astype(np.float32)

    def pair_that_turns(rotations: float) -> float:
        turns = config.yarn_original_positions / (2 * math.pi * rotations)
        return width * math.log(turns) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(config.yarn_beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(config.yarn_beta_slow)), width - 1)
    ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 1e-3), 0, 1)
    return (freqs * (1 - ramp) + freqs / config.yarn_factor * ramp).astype(np.float32)


def rotation(positions: Int[Array, "b t"], freqs: np.ndarray) -> Rotation:
    """Return the rotation at each position; angles are formed in float32 as the reference does."""
    angles = positions.astype(jnp.float32)[..., None] * freqs
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "b t *heads k"], by: Rotation, *, inverse: bool = False) -> Array:
    """Rotate trailing channel pairs (2i, 2i + 1): (a, b) -> (a cos - b sin, a sin + b cos).

    The rotated width is twice the number of angles; the leading channels pass unchanged.
    `inverse` negates the angle. Computed in float32, returned in the dtype of x.
    """
    half = by.cos.shape[-1]
    extra = x.ndim - by.cos.ndim
    shape = (*by.cos.shape[:2], *(1,) * extra, half)
    cos, sin = by.cos.reshape(shape), by.sin.reshape(shape)
    sin = -sin if inverse else sin
    kept, turned = x[..., : x.shape[-1] - 2 * half], x[..., x.shape[-1] - 2 * half :]
    pairs = turned.astype(jnp.float32).reshape(*x.shape[:-1], half, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    turned = turned.reshape(*x.shape[:-1], 2 * half).astype(x.dtype)
    return jnp.concatenate([kept, turned], axis=-1)
