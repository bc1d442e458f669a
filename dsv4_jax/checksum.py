"""Fingerprints of arrays, the same however they are sharded and wherever they are computed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.params import path_name
from dsv4_jax.shapes import Array

STRIDE = 0x9E3779B9  # 2^32 over the golden ratio: scatters the indices
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by bytes of an element
PIECE = 2**16  # elements that the host hashes at once: what fits its cache


def fingerprints(tree: Any) -> Callable[[], dict[str, dict[str, Any]]]:
    """Return a function that says, by the path of each leaf, what it was when this was called.

    That is its dtype, shape, fingerprint, and the number of its infinities and NaNs. The function
    may be called from another thread, when the arrays have been donated. The devices compute now;
    but on CPU the host does, in that call, from the arrays' own buffers, as a program for hundreds
    of shapes would take longer to compile than it saves.

    A fingerprint is two sums, modulo 2^32, over hashes of each element's bits and index. A change
    of one element always changes the first, because the hash maps the bits one to one.
    """
    on_host = jax.default_backend() == "cpu" and jax.process_count() == 1
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = [np.asarray(leaf) for _, leaf in leaves] if on_host else _device_sums(tree)

    def describe() -> dict[str, dict[str, Any]]:
        sums = map(_host_sums, arrays) if on_host else jax.device_get(arrays)
        return {
            path_name(path): {
                "dtype": str(leaf.dtype),
                "shape": list(leaf.shape),
                "fingerprint": f"{int(first):08x}{int(second):08x}",
                "non_finite": int(non_finite),
            }
            for (path, leaf), (first, second, non_finite) in zip(leaves, sums, strict=True)
        }

    return describe


@jax.jit
def _device_sums(tree: Any) -> list[Array]:
    """Return the two sums and the count of bad values of each leaf: uint32 [3]."""
    return [_sums(_bits(x), _index(x.shape), _non_finite(x, jnp), jnp)
            for x in jax.tree.leaves(tree)]


def _host_sums(x: np.ndarray) -> np.ndarray:
    flat, total = x.reshape(-1), np.zeros(3, np.uint32)
    bits = flat.view(WORDS[x.dtype.itemsize])
    for start in range(0, flat.size, PIECE):
        piece = slice(start, start + PIECE)
        part = bits[piece].astype(np.uint32)
        index = np.uint32(start % 2**32) + _counting()[: part.size]
        total += _sums(part, index, _non_finite(flat[piece], np), np)
    return total


@functools.cache
def _counting() -> np.ndarray:
    return np.arange(PIECE, dtype=np.uint32)


def _sums(bits: Array, index: Array, non_finite: Array, xp: Any) -> Array:
    hashed = _mix(bits + index * xp.uint32(STRIDE))
    weighted = hashed * (index * xp.uint32(2) + xp.uint32(1))
    sums = (xp.sum(part, dtype=xp.uint32) for part in (hashed, weighted))
    return xp.stack([*sums, xp.asarray(non_finite, xp.uint32)])


def _mix(x: Array) -> Array:
    """Scatter 32 bits, one to one: the finalizer of MurmurHash3."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _non_finite(x: Array, xp: Any) -> Array | int:
    return xp.sum(~xp.isfinite(x)) if jnp.issubdtype(x.dtype, jnp.floating) else 0


def _bits(x: Array) -> Array:
    """Return the bits of each element as uint32."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize]).astype(jnp.uint32)


def _index(shape: tuple[int, ...]) -> Array:
    """Number the elements in row-major order, modulo 2^32."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        index = index + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return index
