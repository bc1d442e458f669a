"""Index keys as a cache holds them: plain numbers, or FP4 codes and their scales.

A packed key of j channels is j / 2 bytes of E2M1 codes, the even channel of two in the low half,
and an E8M0 scale, 2^(byte - 127), for each 32 channels. To spare a kernel from interleaving the
halves of bytes, queries have their even channels first there, then the odd ones.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.codes import GROUP, halves, powers


def is_packed(stored: Array) -> bool:
    """Say whether stored keys are codes and scales."""
    return stored.dtype == jnp.uint8


def stored_width(channels: int, *, packed: bool) -> int:
    """Return how many numbers or bytes a stored key has."""
    return channels // 2 + -(-channels // GROUP) if packed else channels


def decoded(stored: Array, channels: int, dtype: jnp.dtype) -> Float[Array, "*s j"]:
    """Return stored keys as numbers."""
    if not is_packed(stored):
        return stored.astype(dtype)
    stored = stored.astype(jnp.int32)
    codes, scales = stored[..., : channels // 2], stored[..., channels // 2 :]
    scales = jnp.repeat(powers(scales), GROUP, axis=-1)[..., :channels]
    pairs = jnp.stack(halves(codes), axis=-1)
    return (pairs.reshape(scales.shape) * scales).astype(dtype)


def even_first(x: Float[Array, "*s j"]) -> Float[Array, "*s j"]:
    """Put even channels before odd ones."""
    return jnp.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)
