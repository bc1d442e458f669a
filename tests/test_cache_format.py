"""Stored entries and index keys: every code as ml_dtypes has it, and the bytes of V4's cache."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compiling import quick_jit

from dsv4_jax import InputError, ModelConfig, Runtime
from dsv4_jax.cache import init_cache
from dsv4_jax.cache_format import (
    _decode_e2m1,
    _encode_e2m1,
    check_served,
    decode_entry,
    decode_index_key,
    encode_entry,
    encode_index_key,
    entry_array,
    index_key_array,
    round_index,
)

DATA = Path(__file__).parent / "data"
CONTEXT = 2**20
V32_BYTES = CONTEXT * 61 * (656 + 132)  # fact sheet 8: FP8 latents and FP8 index keys
PLAIN, ROTATED = 448, 64
FLOAT32 = np.dtype(np.float32)


def round_entry(x: jax.Array, config: ModelConfig, form: str) -> jax.Array:
    """Return entries as they come back from a cache."""
    return decode_entry(encode_entry(x, config, form), config, form, x.dtype)


def released(name: str) -> ModelConfig:
    return ModelConfig.from_hf(json.loads((DATA / f"v4_{name}_config.json").read_text()))


FLASH, PRO = released("flash"), released("pro")


def values(*shape: int, seed: int = 0) -> np.ndarray:
    """Values of many magnitudes, some of them exactly between two codes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-4, 3, (*shape[:-1], 1))
    return np.where(rng.random(shape) < 0.2, np.round(x * 4) / 4, x).astype(np.float32)


def reference(x: np.ndarray, group: int, largest: float, floor: float, dtype) -> np.ndarray:
    """Round groups to codes times powers of two, by NumPy and ml_dtypes in float64."""
    groups = x.reshape(*x.shape[:-1], -1, group).astype(np.float64)
    peak = np.maximum(np.abs(groups).max(axis=-1, keepdims=True), floor)
    scale = 2.0 ** np.ceil(np.log2(peak / largest))
    codes = np.clip(groups / scale, -largest, largest).astype(np.float32).astype(dtype)
    return (codes.astype(np.float64) * scale).reshape(x.shape).astype(np.float32)


def test_served_entries_are_fp8_and_bfloat16():
    x = values(64, PLAIN + ROTATED)
    stored = quick_jit(lambda x: encode_entry(x, FLASH, "served"))(x)
    assert stored.shape == (64, 584) and stored.dtype == jnp.uint8
    out = quick_jit(lambda s: decode_entry(s, FLASH, "served", FLOAT32))(stored)
    expected = reference(x[:, :PLAIN], 64, 448.0, 1e-4, ml_dtypes.float8_e4m3fn)
    assert np.array_equal(out[:, :PLAIN], expected)
    assert np.array_equal(out[:, PLAIN:], x[:, PLAIN:].astype(ml_dtypes.bfloat16))


def test_served_index_keys_are_rotated_fp4():
    x = values(64, 128)
    stored = quick_jit(lambda x: encode_index_key(x, "served"))(x)
    assert stored.shape == (64, 68) and stored.dtype == jnp.uint8
    out = quick_jit(lambda s: decode_index_key(s, 128, "served", FLOAT32))(stored)
    sign = np.array([[(-1.0) ** (i & j).bit_count() for j in range(128)] for i in range(128)])
    rotated = (x.astype(np.float64) @ sign * 128**-0.5).astype(np.float32)
    expected = reference(rotated, 32, 6.0, 6 * 2.0**-126, ml_dtypes.float4_e2m1fn)
    # The rotation's sums are rounded in another order: a value at a midpoint may fall either way.
    assert np.mean(out == expected) > 0.999
    assert np.array_equal(round_index(jnp.asarray(x), "served"), out)


def test_every_fp4_midpoint_goes_to_the_even_code():
    grid = np.arange(-24, 25, dtype=np.float32) / 4
    codes = _encode_e2m1(jnp.asarray(grid))
    out, zeros = np.moveaxis(_decode_e2m1(codes), -1, 0)  # a code alone, in the lower bits
    assert not zeros.any()
    assert np.array_equal(out, _decode_e2m1(codes << 4)[..., 1])
    assert np.array_equal(out, grid.astype(ml_dtypes.float4_e2m1fn).astype(np.float32))


def test_index_scores_survive_the_rotation():
    """Both sides are rotated alike: products change by rounding to 4 bits only."""
    q, k = values(32, 128, seed=1), values(256, 128, seed=2)
    keys = decode_index_key(encode_index_key(k, "served"), 128, "served", FLOAT32)
    actual = round_index(jnp.asarray(q), "served") @ keys.T
    norms = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(k, axis=1)
    assert np.abs(actual - q @ k.T).max() < 0.1 * norms.max()
    assert np.corrcoef(np.ravel(actual / norms), np.ravel(q @ k.T / norms))[0, 1] > 0.98


@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_plain_formats_are_casts(form):
    x = values(8, PLAIN + ROTATED)
    assert np.array_equal(round_entry(jnp.asarray(x), FLASH, form), x.astype(form).astype("f4"))
    keys = values(8, 128)
    assert np.array_equal(encode_index_key(keys, form), keys.astype(form))


@pytest.mark.parametrize("width, rotated, stored", [(32, 16, 56), (64, 64, 128), (16, 2, 26)])
def test_entries_of_other_widths(width, rotated, stored):
    config = dataclasses.replace(FLASH, head_dim=width, qk_rope_head_dim=rotated)
    assert entry_array(config, "served") == (stored, jnp.uint8)
    x = jnp.asarray(values(8, width))
    out = round_entry(x, config, "served")
    assert np.array_equal(round_entry(out, config, "served"), out)  # nothing is lost twice
    assert np.abs(out - x).max() <= 2**-4 * np.abs(x).max()


def test_index_keys_of_other_widths():
    config = dataclasses.replace(FLASH, index_head_dim=96)
    with pytest.raises(InputError, match="index_head_dim to be a power of two.*got 96"):
        check_served(config.index_head_dim)
    assert index_key_array(dataclasses.replace(FLASH, index_head_dim=64), "served")[0] == 34


def shapes_of(config: ModelConfig, **options):
    runtime = Runtime(cache="served", dtype="bfloat16")
    make = functools.partial(init_cache, config, runtime, rows=1, max_length=CONTEXT, **options)
    return jax.eval_shape(make)


def bytes_of(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("config, gib, percent, pending_mib", [
    (FLASH, 3.435, 7.32, 11.6), (PRO, 4.918, 10.48, 17.8),
])
def test_bytes_at_a_million_tokens(config, gib, percent, pending_mib):
    """Source: fact sheet 8."""
    layers = shapes_of(config).layers.values()
    stores = [store for layer in layers for store in (layer.main, layer.index) if store is not None]
    kept = bytes_of([layer.window for layer in layers] + [store.entries for store in stores])
    assert round(kept / 2**30, 3) == gib
    assert round(100 * kept / V32_BYTES, 2) == percent
    assert round(bytes_of([store.pending for store in stores]) / 2**20, 1) == pending_mib
    drafting = shapes_of(config, drafting=True).mtp
    assert bytes_of(drafting.layer) == config.sliding_window * 584
    assert drafting.layer.main is None and drafting.layer.index is None


def test_allocated_bytes_are_those_of_the_shapes():
    config = dataclasses.replace(
        FLASH, vocab_size=32, hidden_size=16, layer_types=("window", "csa", "hca"),
        moe_types=("learned",) * 3,
    )
    runtime = Runtime(cache="served", dtype="bfloat16")
    made = init_cache(config, runtime, rows=2, max_length=2**15)
    allocated = sum(leaf.nbytes for leaf in jax.tree.leaves(made))
    entries = 2**15 // 4 * (584 + 68) + 2**15 // 128 * 584
    windows = 3 * 128 * 584
    pending = 2 * 4 * (8 * 1024 + 8 * 256 + 128 * 512)
    assert allocated == 2 * (entries + windows + pending + 4)
