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
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.config import SERVED, ModelConfig
from dsv4_jax.errors import InputError
from dsv4_jax.quant import E8M0_BIAS, FP4, FP8, Format
from dsv4_jax.rounding import FP8_FLOOR, nearest, scale_exponents, straight_through, times_power
from dsv4_jax.shapes import Array, Float, Int, UInt8

FP8_GROUP = 64
FP4_GROUP, FP4_FLOOR = 32, 6 * 2.0**-126
SCALE_BYTES = 8  # the scales of an entry fill a multiple of so many bytes

# The two values of every byte of FP4 codes.
_FP4 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_FP4 = np.concatenate([_FP4, -_FP4])
_FP4_PAIRS = np.stack([_FP4[np.arange(256) & 15], _FP4[np.arange(256) >> 4]], axis=-1)


def check_served(width: int) -> None:
    """Raise an InputError unless index keys of this width can be rotated by a Hadamard matrix."""
    if width & (width - 1):
        raise InputError(
            "index keys in FP4: expected index_head_dim to be a power of two, which a Hadamard "
            f"matrix rotates, got {width}; set runtime.indexer to 'plain' and runtime.cache to "
            "'bfloat16' or 'float32'"
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


def round_entry(x: Float[Array, "*rows k"], config: ModelConfig) -> Float[Array, "*rows k"]:
    """Return key-value entries as they come back from a served cache; straight-through."""
    return straight_through(partial(_round_entry, config=config), x)


def _round_entry(x: Array, config: ModelConfig) -> Array:
    return decode_entry(encode_entry(x, config, SERVED), config, SERVED, x.dtype)


def encode_index_key(x: Float[Array, "*rows j"], form: str) -> Array:
    """Store index keys."""
    return _encode_fp4(_rotate(x)) if form == SERVED else x.astype(form)


def decode_index_key(
    stored: Array, width: int, form: str, dtype: jnp.dtype
) -> Float[Array, "*rows j"]:
    """Return stored index keys of `width` channels as numbers; served ones stay rotated."""
    if form != SERVED:
        return stored.astype(dtype)
    packed, scales = stored[..., : width // 2], stored[..., width // 2 :]
    values = _decode_e2m1(packed).reshape(*stored.shape[:-1], width)
    return (values * _spread(scales, FP4_GROUP, width)).astype(dtype)


def round_index(x: Float[Array, "*rows j"], form: str) -> Array:
    """Return index queries or keys as stored keys are: rotated and rounded, straight-through."""
    if form != SERVED:
        return x
    return straight_through(_round_fp4, _rotate(x)).astype(x.dtype)


def round_scores(scores: Float[Array, "*rows c"], form: str) -> Float[Array, "*rows c"]:
    """Return index scores as the choice of entries compares them: served ones in bfloat16.

    Conversions there and back would be left out by XLA on GPU.
    """
    if form != SERVED:
        return scores
    return jax.lax.reduce_precision(scores, exponent_bits=8, mantissa_bits=7)


def _split_width(config: ModelConfig) -> tuple[int, int]:
    return config.head_dim - config.qk_rope_head_dim, config.qk_rope_head_dim


def _encode_fp8(x: Float[Array, "*rows k"]) -> tuple[UInt8[Array, "*rows k"], Array]:
    groups, exponents = _scaled(x, FP8_GROUP, FP8, FP8_FLOOR)
    codes = nearest(groups, FP8).astype(jnp.float8_e4m3fn)
    codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
    return _join(codes, x.shape[-1]), exponents


def _scaled(
    x: Float[Array, "*rows k"], group: int, form: Format, floor: float
) -> tuple[Float[Array, "*rows g group"], Int[Array, "*rows g"]]:
    """Divide groups of channels by the least power of two that brings them into the range.

    The last group is filled up with zeros. Returns the groups and the exponents.
    """
    missing = -x.shape[-1] % group
    x = jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, missing)))
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // group, group)
    largest = jnp.maximum(jnp.max(jnp.abs(groups), axis=-1), floor)
    exponents = scale_exponents(largest, form)
    return times_power(groups, -exponents[..., None]), exponents


def _join(groups: Array, width: int) -> Array:
    """Put groups of channels side by side again."""
    return groups.reshape(*groups.shape[:-2], groups.shape[-2] * groups.shape[-1])[..., :width]


def _encode_fp4(x: Float[Array, "*rows j"]) -> UInt8[Array, "*rows bytes"]:
    groups, exponents = _scaled(x, FP4_GROUP, FP4, FP4_FLOOR)
    codes = _encode_e2m1(_join(groups, x.shape[-1]))
    packed = codes[..., ::2] | (codes[..., 1::2] << 4)
    return jnp.concatenate([packed, (exponents + E8M0_BIAS).astype(jnp.uint8)], axis=-1)


def _round_fp4(x: Float[Array, "*rows j"]) -> Float[Array, "*rows j"]:
    return decode_index_key(_encode_fp4(x), x.shape[-1], SERVED, x.dtype)


def _spread(scales: UInt8[Array, "*rows g"], group: int, width: int) -> Float[Array, "*rows k"]:
    """Return the scale of every channel."""
    values = jax.lax.bitcast_convert_type(scales.astype(jnp.int32) << 23, jnp.float32)
    return jnp.repeat(values, group, axis=-1)[..., :width]


def _encode_e2m1(x: Float[Array, "*rows j"]) -> UInt8[Array, "*rows j"]:
    size = nearest(jnp.abs(x), FP4)
    # The codes 0 to 7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6: steps of a half, of one, of two.
    code = jnp.minimum(jnp.minimum(2 * size, size + 2), size / 2 + 4)
    return code.astype(jnp.uint8) | (jnp.signbit(x).astype(jnp.uint8) << 3)


def _decode_e2m1(packed: UInt8[Array, "*rows half"]) -> Float[Array, "*rows half 2"]:
    """Return the two values in each byte, that of the lower bits first.

    On CPU looking a byte up takes half the time of taking its bits apart.
    """
    return jnp.asarray(_FP4_PAIRS).at[packed].get(mode="promise_in_bounds")


def _rotate(x: Float[Array, "*rows j"]) -> Float[Array, "*rows j"]:
    check_served(x.shape[-1])
    matrix = _hadamard(x.shape[-1])
    return jnp.einsum("...j,jx->...x", x.astype(jnp.float32), matrix, precision="highest")


@functools.cache
def _hadamard(width: int) -> np.ndarray:
    """Return the orthogonal Hadamard matrix of Sylvester's order; it is its own inverse."""
    matrix = np.ones((1, 1))
    while len(matrix) < width:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix * width**-0.5).astype(np.float32)
