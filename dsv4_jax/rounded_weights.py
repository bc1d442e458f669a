"""Weights rounded to what a quantised checkpoint stores, for training that is aware of it.

Training keeps its weights in float32 and takes the gradient at the rounded ones: forward and
backward pass multiply by the same rounded matrices, and what the gradient moves are the weights
before rounding. That is the straight-through gradient, and weights are rounded once a step,
whatever the number of micro-batches and recomputations.

Source: fact sheet 5 and 13F.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from dsv4_jax.config import PLAIN, ModelConfig
from dsv4_jax.convert.storage import FLOAT32, Storage, target_storage
from dsv4_jax.convert.table import Layout, tensors_of
from dsv4_jax.quant import Format
from dsv4_jax.rounding import round_blocks
from dsv4_jax.shapes import Array


def round_weights(params: dict, config: ModelConfig, linears: str) -> dict:
    """Return parameters as a checkpoint written with this dtype gives them back, bit for bit.

    Args:
      params: those of a `Transformer`, or some of them.
      linears: as in `Runtime`: "fp8" rounds all matrices that checkpoints can have in FP8; "fp4"
        rounds the routed experts to FP4 and the others to FP8, as released; "plain" none.
    """
    return params if linears == PLAIN else _round_all(params, config, linears)


@functools.partial(jax.jit, static_argnames=("config", "linears"))
def _round_all(params: dict, config: ModelConfig, linears: str) -> dict:
    stored = _stored_matrices(config, linears)
    return unflatten_dict({
        path: _round_leaf(w, *stored[path]) if path in stored else w
        for path, w in flatten_dict(params, sep="/").items()
    }, sep="/")


@functools.lru_cache(maxsize=4)
def _stored_matrices(config: ModelConfig, linears: str) -> dict[str, tuple[Layout, Format]]:
    """Return how the matrices of each quantised leaf lie in a checkpoint, by the leaf's path."""
    found = {}
    for tensor in tensors_of(config):
        form = target_storage(tensor, Storage(FLOAT32), linears).form
        if form is not None:
            (part,) = tensor.parts
            found[part.path] = part.layout, form
    return found


def _round_leaf(w: Array, layout: Layout, form: Format) -> Array:
    """Round each of a leaf's matrices: stacked layers and experts have their own."""

    def round_matrix(w: Array) -> Array:
        matrix = layout.to_tensor(w.astype(jnp.float32))
        return layout.to_leaf(round_blocks(matrix, form, form.block)).astype(w.dtype)

    for _ in range(w.ndim - len(layout.sizes)):
        round_matrix = jax.vmap(round_matrix)
    return round_matrix(w)
