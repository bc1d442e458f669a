"""How a cache stores key-value entries and index keys: plain numbers, or the served FP8 and FP4.

A served entry is, byte by byte: the channels that are not rotated as FP8 (E4M3), the rotated ones
as bfloat16, and one power of two for each 64 FP8 channels, filled up to whole 8 bytes; 584 bytes
for V4's 448 + 64 channels. A served index key is its FP4 codes (E2M1), two in a byte, and one power
of two for each 32 of them; 68 bytes for V4's 128 channels. It is rotated by a Hadamard matrix
before, which spreads outliers; the index queries are rotated and rounded alike.

Source: report 2.3.4, 5.2.1; fact sheet 2.6, 2.7 and 7 (cache format).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.config import SERVED, ModelConfig
from dsv4_jax.errors import InputError
from dsv4_jax.shapes import Array, Float, Int, UInt8

FP8_GROUP, FP8_LARGEST, FP8_FLOOR = 64, 448.0, 1e-4
FP4_GROUP, FP4_LARGEST, FP4_FLOOR = 32, 6.0, 6 * 2.0**-126
SCALE_BYTES = 8  # the scales of an entry fill a multiple of so many bytes
E8M0_BIAS = 127

# Between two neighbours of E2M1's grid 0 0.5 1 1.5 2 3 4 6; a tie goes to the even code.
FP4_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
FP4_TIES_UP = (False, True, False, True, False, True, False)

# The two values of every byte of FP4 codes.
_FP4 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_FP4 = np.concatenate([_FP4, -_FP4])
_FP4_PAIRS = np.stack([_FP4[np.arange(256) & 15], _FP4[np.arange(256) >> 4]], axis=-1)


def check_served(config: ModelConfig) -> None:
    """Raise an InputError unless a model's index keys can be rotated by a Hadamard matrix."""
    width = config.index_head_dim
    if width & (width - 1):
        raise InputError(
            "cache 'served': expected index_head_dim to be a power of two, which a Hadamard "
            f"matrix rotates, got {width}; store the cache as 'bfloat16' or 'float32'"
        )


def entry_array(config: ModelConfig, form: str) -> tuple[int, jnp.dtype]:
    """Return the width and dtype of a stored key-value entry."""
    if form != SERVED:
        return config.head_dim, jnp.dtype(form)
    plain, rotated = _split_width(config)
    scales = -(-plain // FP8_GROUP)
    return plain + 2 * rotated + -(-scales // SCALE_BYTES) * SCALE_BYTES, jnp.dtype("uint8")


def index_key_array(config: ModelConfig, form: str) -> tuple[int, jnp.dtype]:
    """Return the width and dtype of a stored index key."""
    width = config.index_head_dim
    if form != SERVED:
        return width, jnp.dtype(form)
    return width // 2 + -(-width // FP4_GROUP), jnp.dtype("uint8")


def encode_entry(x: Float[Array, "*rows k"], config: ModelConfig, form: str) -> Array:
    """Store key-value entries, rotated channels last."""
    if form != SERVED:
        return x.astype(form)
    plain, rotated = _split_width(config)
    codes, exponents = _encode_fp8(x[..., :plain].astype(jnp.float32))
    turned = jax.lax.bitcast_convert_type(x[..., plain:].astype(jnp.bfloat16), jnp.uint8)
    turned = turned.reshape(*x.shape[:-1], 2 * rotated)
    scales = (exponents + E8M0_BIAS).astype(jnp.uint8)
    out = jnp.concatenate([codes, turned, scales], axis=-1)
    missing = entry_array(config, form)[0] - out.shape[-1]
    return jnp.pad(out, (*((0, 0),) * (x.ndim - 1), (0, missing)))


def decode_entry(
    stored: Array, config: ModelConfig, form: str, dtype: jnp.dtype
) -> Float[Array, "*rows k"]:
    """Return stored key-value entries as numbers."""
    if form != SERVED:
        return stored.astype(dtype)
    plain, rotated = _split_width(config)
    scales = stored[..., plain + 2 * rotated :][..., : -(-plain // FP8_GROUP)]
    codes = jax.lax.bitcast_convert_type(stored[..., :plain], jnp.float8_e4m3fn)
    values = codes.astype(jnp.float32) * _spread(scales, FP8_GROUP, plain)
    turned = stored[..., plain : plain + 2 * rotated].reshape(*stored.shape[:-1], rotated, 2)
    turned = jax.lax.bitcast_convert_type(turned, jnp.bfloat16)
    return jnp.concatenate([values.astype(dtype), turned.astype(dtype)], axis=-1)


def encode_index_key(x: Float[Array, "*rows j"], form: str) -> Array:
    """Store index keys."""
    if form != SERVED:
        return x.astype(form)
    width = x.shape[-1]
    spread = jnp.einsum("...j,jx->...x", x.astype(jnp.float32), _hadamard(width),
                        precision="highest")
    groups, exponents = _scaled(spread, FP4_GROUP, FP4_LARGEST, FP4_FLOOR)
    codes = _encode_e2m1(groups.reshape(*x.shape[:-1], -1)[..., :width])
    packed = codes[..., ::2] | (codes[..., 1::2] << 4)
    return jnp.concatenate([packed, (exponents + E8M0_BIAS).astype(jnp.uint8)], axis=-1)


def decode_index_key(
    stored: Array, width: int, form: str, dtype: jnp.dtype
) -> Float[Array, "*rows j"]:
    """Return stored index keys of `width` channels as numbers; served ones stay rotated."""
    if form != SERVED:
        return stored.astype(dtype)
    packed, scales = stored[..., : width // 2], stored[..., width // 2 :]
    values = _decode_e2m1(packed).reshape(*stored.shape[:-1], width)
    return (values * _spread(scales, FP4_GROUP, width)).astype(dtype)


def round_index_query(x: Float[Array, "*rows j"], form: str) -> Array:
    """Return index queries as the stored keys have to meet them: rotated and rounded alike."""
    if form != SERVED:
        return x
    return decode_index_key(encode_index_key(x, form), x.shape[-1], form, x.dtype)


def round_scores(scores: Float[Array, "*rows c"], form: str) -> Float[Array, "*rows c"]:
    """Return index scores as the choice of entries compares them: served ones in bfloat16."""
    return scores.astype(jnp.bfloat16).astype(jnp.float32) if form == SERVED else scores


def _split_width(config: ModelConfig) -> tuple[int, int]:
    return config.head_dim - config.qk_rope_head_dim, config.qk_rope_head_dim


def _encode_fp8(x: Float[Array, "*rows k"]) -> tuple[UInt8[Array, "*rows k"], Array]:
    groups, exponents = _scaled(x, FP8_GROUP, FP8_LARGEST, FP8_FLOOR)
    codes = jnp.clip(groups, -FP8_LARGEST, FP8_LARGEST).astype(jnp.float8_e4m3fn)
    codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
    return codes.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]], exponents


def _scaled(
    x: Float[Array, "*rows k"], group: int, largest: float, floor: float
) -> tuple[Float[Array, "*rows g group"], Int[Array, "*rows g"]]:
    """Divide groups of channels by the least power of two that brings them into the range.

    The last group is filled up with zeros. Returns the groups and the exponents.
    """
    missing = -x.shape[-1] % group
    x = jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, missing)))
    groups = x.reshape(*x.shape[:-1], -1, group)
    needed = jnp.maximum(jnp.max(jnp.abs(groups), axis=-1), floor) / largest
    bits = jax.lax.bitcast_convert_type(needed, jnp.int32)
    exponents = (bits >> 23) - E8M0_BIAS + ((bits & 0x7FFFFF) != 0)
    return groups * _power_of_two(-exponents)[..., None], exponents


def _power_of_two(exponents: Int[Array, "*rows g"]) -> Float[Array, "*rows g"]:
    return jax.lax.bitcast_convert_type((exponents + E8M0_BIAS) << 23, jnp.float32)


def _spread(scales: UInt8[Array, "*rows g"], group: int, width: int) -> Float[Array, "*rows k"]:
    """Return the scale of every channel."""
    values = jax.lax.bitcast_convert_type(scales.astype(jnp.int32) << 23, jnp.float32)
    return jnp.repeat(values, group, axis=-1)[..., :width]


def _encode_e2m1(x: Float[Array, "*rows j"]) -> UInt8[Array, "*rows j"]:
    size = jnp.abs(x)
    above = (
        size >= middle if up else size > middle
        for middle, up in zip(FP4_MIDPOINTS, FP4_TIES_UP, strict=True)
    )
    return (sum(a.astype(jnp.uint8) for a in above) | (jnp.signbit(x).astype(jnp.uint8) << 3))


def _decode_e2m1(packed: UInt8[Array, "*rows half"]) -> Float[Array, "*rows half 2"]:
    """Return the two values in each byte, that of the lower bits first.

    On CPU looking a byte up takes half the time of taking its bits apart.
    """
    return jnp.asarray(_FP4_PAIRS).at[packed].get(mode="promise_in_bounds")


@functools.cache
def _hadamard(width: int) -> np.ndarray:
    """Return the orthogonal Hadamard matrix of Sylvester's order; it is its own inverse."""
    matrix = np.ones((1, 1))
    while len(matrix) < width:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix * width**-0.5).astype(np.float32)
