"""Compute over long axes piece by piece, so that large intermediates exist for one piece only."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv4_jax.shapes import Array
from pallas_kernels.target import target_platform

# Elements of the largest intermediate held at once. On CPU it should stay in cache; accelerators
# want few, large steps and have the memory for them.
CHUNK_ELEMENTS = {"cpu": 2**18, "gpu": 2**27, "tpu": 2**27}
KEPT = "kept_for_backward"


def map_chunks(fn: Callable, tree, elements: int):
    """Apply fn to pieces of the second axis of a tree of arrays and join what it returns.

    Pieces are recomputed in the backward pass, except for what fn marks with `keep`. The last
    piece is filled up with zeros, and what fn makes of those is cut off.

    Args:
      fn: from a tree of [b, size, ...] to another.
      elements: size of fn's largest intermediate per unit of the second axis.
    """
    fn = jax.checkpoint(fn, policy=jax.checkpoint_policies.save_only_these_names(KEPT))
    length = jax.tree.leaves(tree)[0].shape[1]
    if _piece_size(length, elements) == length:
        return fn(tree)
    return jax.tree.map(lambda x: join(x, length), jax.lax.map(fn, split(tree, elements)))


def split(tree, elements: int):
    """Cut the second axis of a tree of arrays into equal pieces: [b, t, ...] to [z, b, size, ...].

    The last piece is filled up with zeros.

    Args:
      elements: size of the largest intermediate per unit of the second axis.
    """
    length = jax.tree.leaves(tree)[0].shape[1]
    size = _piece_size(length, elements)
    count = math.ceil(length / size)

    def pieces(x):
        x = jnp.pad(x, ((0, 0), (0, count * size - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    return jax.tree.map(pieces, tree)


def _piece_size(length: int, elements: int) -> int:
    count = math.ceil(length * elements / CHUNK_ELEMENTS[target_platform()])
    return math.ceil(length / min(max(count, 1), length))


def join(pieces: Array, length: int) -> Array:
    """Undo `split` of an axis of this length."""
    out = jnp.moveaxis(pieces, 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length]


def keep(x: Array) -> Array:
    """Mark an intermediate of a piece as worth storing: it is costly to redo."""
    return checkpoint_name(x, KEPT)


def power_of_two_times(base: int, least: int) -> int:
    """Return the smallest base * 2^n that is at least `least`: few sizes mean few programs."""
    return base * 2 ** max(0, -(-least // base) - 1).bit_length()
