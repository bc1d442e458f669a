"""What the GPU's programs of the indexer's loss have in common."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.blocks import pad_axes, power_of_two
from pallas_kernels.index_loss.parts import Inputs, Slopes
from pallas_kernels.sparse_attention.gpu_queries import LOG2_E
from pallas_kernels.sparse_attention.index import Entries
from pallas_kernels.sparse_attention.seen import Seen, pack_chosen


class Tiles(NamedTuple):
    """How the work is cut up."""

    entries: int  # of a tile
    warps: int
    stages: int  # tiles whose loads are under way


class OfQueries(NamedTuple):
    """What belongs to queries, or references to it; None: not needed."""

    queries: Float[Array, "b t i j"]
    head_weights: Float[Array, "b t i"]
    q: Float[Array, "b t h k"] | None = None
    log_total: Float[Array, "b t h"] | None = None  # in powers of 2
    first: Int[Array, "b t"] | None = None  # of a range
    end: Int[Array, "b t"] | None = None
    chosen: Int[Array, "b t l"] | None = None  # filled up to whole tiles
    words: Int[Array, "b t w"] | None = None  # the best of a range
    mass: Float[Array, "b t l"] | None = None  # of chosen entries
    slopes: Slopes | None = None


class OfEntries(NamedTuple):
    """What belongs to entries, or references to it."""

    keys: Float[Array, "b c j"]
    entries: Float[Array, "b c k"] | None = None


def fitted(
    x: Inputs, seen: Seen, tile: int, *, best: Seen | None = None, mass=None,
    slopes: Slopes | None = None,
) -> tuple[OfQueries, OfEntries]:
    """Fill heads and channels up to powers of two; further heads weigh nothing.

    Args:
      tile: of which chosen entries fill whole ones.
      mass: of chosen entries, as the forward pass kept it: then there is no need of what it is
        made from.
    """
    heads, width = power_of_two(x.queries.shape[2]), power_of_two(x.queries.shape[3])
    own = OfQueries(
        pad_axes(x.queries, {2: heads, 3: width}),
        pad_axes(x.head_weights.astype(jnp.float32), {2: heads}), mass=mass, slopes=slopes,
    )
    shared = OfEntries(pad_axes(x.keys, {2: width}))
    if mass is None:
        heads, width = power_of_two(x.q.shape[2]), power_of_two(x.q.shape[3])
        log_total = jnp.pad(
            x.log_total * LOG2_E, ((0, 0), (0, 0), (0, heads - x.q.shape[2])),
            constant_values=jnp.inf,
        )
        own = own._replace(q=pad_axes(x.q, {2: heads, 3: width}), log_total=log_total)
        shared = shared._replace(entries=pad_axes(x.entries, {2: width}))
    if seen.chosen is not None:
        own = own._replace(chosen=pad_axes(seen.chosen, {2: tile}, fill=-1))
    else:
        own = own._replace(first=seen.first, end=seen.end)
    if best is not None:
        own = own._replace(words=pack_chosen(best.chosen, x.entries.shape[1]))
    return own, shared


def over_tiles(own: OfQueries, tile: int):
    """Return how many tiles of entries a query attends to, and a function that returns one.

    The function takes the number of a tile and returns rows that exist, and which are attended to.
    """
    if own.chosen is not None:

        def chosen_tile(i):
            entry = own.chosen[pl.ds(i * tile, tile)]
            return jnp.maximum(entry, 0), entry >= 0

        return own.chosen.shape[0] // tile, chosen_tile
    entries, first, end = Entries(tile), own.first[...], own.end[...]

    def range_tile(i):
        entry = entries.entry(first, i, jnp.arange(tile))
        return entries.row(entry, end), entries.sees(end, entry)

    return entries.tiles(first, end), range_tile


def mass_of(
    q: Float[Array, "h k"], log_total: Float[Array, " h"], entries: Float[Array, "s k"],
    scale: float,
) -> Float[Array, " s"]:
    """Return the attention that heads give to a tile of entries."""
    logits = plgpu.dot(q, entries, trans_b=True) * (scale * LOG2_E)
    return jnp.sum(jnp.exp2(logits - log_total[:, None]), axis=0)


def hits_of(queries: Float[Array, "i j"], keys: Float[Array, "s j"]) -> Float[Array, "i s"]:
    """Return relu(q . k)."""
    return jnp.maximum(plgpu.dot(queries, keys, trans_b=True), 0.0)


def score_gradient(
    hits: Float[Array, "i s"], weights: Float[Array, " i"], mass: Float[Array, " s"],
    visible, slopes: tuple,
) -> Float[Array, " s"]:
    """Return the gradient of a tile's scores."""
    log_norm, share, rate = slopes
    learner = jnp.exp(jnp.sum(hits * weights[:, None], axis=0) - log_norm)
    return jnp.where(visible, share * learner - rate * mass, 0.0)


def hit_gradient(hits, weights, grad: Float[Array, " s"]) -> Float[Array, "i s"]:
    """Return the gradient of q . k from that of the scores."""
    return jnp.where(hits > 0, weights[:, None] * grad[None, :], 0.0)
