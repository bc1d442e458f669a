"""Fingerprints of arrays, computed where they lie and the same however they are sharded."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.params import path_name
from dsv4_jax.shapes import Array

SEEDS = (0x243F6A88, 0x85A308D3)  # digits of pi; two sums of 32 bits make one of 64


def fingerprints(tree: Any) -> dict[str, dict[str, Any]]:
    """Return, by the path of each leaf, its dtype, shape, fingerprint and count of bad values.

    The fingerprint is a sum, modulo 2^32, over hashes of each element's bits and index: it is the
    same on every mesh, and a change of one element always changes it, because the hash of an index
    maps bits one to one. `non_finite` counts the infinities and NaNs of a floating-point leaf.
    """
    sums = jax.device_get(_sums(tree))
    return {
        path_name(path): {
            "dtype": str(leaf.dtype),
            "shape": list(leaf.shape),
            "fingerprint": "".join(f"{int(part):08x}" for part in hashes),
            "non_finite": int(non_finite),
        }
        for (path, leaf), (hashes, non_finite) in zip(
            jax.tree_util.tree_leaves_with_path(tree), sums, strict=True
        )
    }


@jax.jit
def _sums(tree: Any) -> list[tuple[Array, Array]]:
    return [_sums_of(leaf) for leaf in jax.tree.leaves(tree)]


def _sums_of(x: Array) -> tuple[Array, Array]:
    bits, index = _bits(x), _index(x.shape)
    hashes = jnp.stack([jnp.sum(_mix(bits ^ _mix(index ^ jnp.uint32(seed)))) for seed in SEEDS])
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return hashes, jnp.sum(~jnp.isfinite(x)) if floating else jnp.zeros((), jnp.int32)


def _bits(x: Array) -> Array:
    """Return the bits of each element as uint32."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)


def _index(shape: tuple[int, ...]) -> Array:
    """Number the elements in row-major order, modulo 2^32."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        index = index + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return index


def _mix(x: Array) -> Array:
    """Scatter 32 bits, one to one: the finalizer of MurmurHash3."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
