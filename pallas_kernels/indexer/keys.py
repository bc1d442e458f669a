"""Index keys as a cache holds them: plain numbers, or FP4 codes and their scales.

A packed key of j channels is j / 2 bytes of E2M1 codes, the even channel of two in the low half,
and an E8M0 scale, 2^(byte - 127), for each 32 channels. To spare a kernel from interleaving the
halves of bytes, queries have their even channels first there, then the odd ones.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

GROUP = 32  # channels that share a scale
BYTES = GROUP // 2  # of their codes
_HALF = 126 << 23  # the bits of 0.5


def is_packed(stored: Array) -> bool:
    """Say whether stored keys are codes and scales."""
    return stored.dtype == jnp.uint8


def stored_width(channels: int, *, packed: bool) -> int:
    """Return how many numbers or bytes a stored key has."""
    return channels // 2 + -(-channels // GROUP) if packed else channels


def powers(scales: Int[Array, "*s"]) -> Float[Array, "*s"]:
    """Return the multiplier of each scale; that of 0, 2^-127, is too small for float32: 0."""
    return jax.lax.bitcast_convert_type(scales << 23, jnp.float32)


def value(code: Int[Array, "*s"]) -> Float[Array, "*s"]:
    """Return 0, .5, 1, 1.5, 2, 3, 4, 6 for 0 to 7, and these below 0 for 8 to 15.

    The two bits of the exponent and that of the mantissa, put where float32 has them, make .5, .75,
    1, 1.5, 2, 3, 4, 6: below 1 that is right but for a factor of 2 and 1 too much.
    """
    found = jax.lax.bitcast_convert_type(((code & 7) << 22) + _HALF, jnp.float32)
    found = jnp.minimum(found, 2 * found - 1)
    return jnp.where(code >= 8, -found, found)


def halves(byte: Int[Array, "*s"]) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """Return the values of the even and of the odd channel of each byte of codes."""
    return value(byte & 15), value(byte >> 4)


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
