"""What codes of few bits stand for: FP4 (E2M1), two in a byte, and scales (E8M0)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

GROUP = 32  # FP4 codes that share a scale
BYTES = GROUP // 2  # of these codes
_HALF = 126 << 23  # the bits of 0.5


def powers(scales: Int[Array, "*s"]) -> Float[Array, "*s"]:
    """Return the multiplier 2^(byte - 127) of each scale; that of 0 is too small for float32: 0."""
    return jax.lax.bitcast_convert_type(scales.astype(jnp.int32) << 23, jnp.float32)


def value(code: Int[Array, "*s"]) -> Float[Array, "*s"]:
    """Return 0, .5, 1, 1.5, 2, 3, 4, 6 for 0 to 7, and these below 0 for 8 to 15.

    The two bits of the exponent and that of the mantissa, put where float32 has them, make .5, .75,
    1, 1.5, 2, 3, 4, 6: below 1 that is right but for a factor of 2 and 1 too much.
    """
    found = jax.lax.bitcast_convert_type(((code & 7) << 22) + _HALF, jnp.float32)
    found = jnp.minimum(found, 2 * found - 1)
    return jnp.where(code >= 8, -found, found)


def halves(byte: Int[Array, "*s"]) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """Return the values of the code in the low and of that in the high half of each byte."""
    return value(byte & 15), value(byte >> 4)
