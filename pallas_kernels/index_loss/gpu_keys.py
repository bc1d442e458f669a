"""The gradient of the indexer's keys on GPU: a program for each tile of them, over the queries.

Where tiles are few, several programs share the queries of one; their sums are added up in order,
so that bits do not depend on which program is first.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.blocks import pad_axes
from pallas_kernels.index_loss.gpu_tiles import (
    OfEntries,
    OfQueries,
    Tiles,
    fitted,
    hit_gradient,
    hits_of,
    score_gradient,
)
from pallas_kernels.index_loss.index import Slots
from pallas_kernels.index_loss.parts import Inputs, Slopes
from pallas_kernels.sparse_attention.gpu_keys import query_ranges
from pallas_kernels.sparse_attention.gpu_queries import LOG2_E
from pallas_kernels.sparse_attention.index import Split
from pallas_kernels.sparse_attention.seen import Seen
from pallas_kernels.target import GPU, target_platform

TILES = Tiles(64, 4, 3)
RANGE_STAGES = 2  # of heads: entries of 512 channels fill much of the memory
HEADS = 32  # of a query in one product, whose rows are entries
PROGRAMS = 264  # two for each of an H100's multiprocessors, to share them evenly


class Ranges(NamedTuple):
    """The queries that may attend to any of a tile, and where they keep what they do."""

    begin: Int[Array, "b n"]
    end: Int[Array, "b n"]
    slot: Int[Array, "b n t"] | None  # the first of a query's that does not come before the tile


def key_gradient(
    x: Inputs, seen: Seen, slopes: Slopes, mass: Float[Array, "b t l"] | None
) -> Float[Array, "b c j"]:
    """Return the gradient of the keys.

    Args:
      mass: of chosen entries, as the forward pass kept it.
    """
    tile, scale, (b, c, width) = TILES.entries, x.q.shape[3] ** -0.5, x.keys.shape
    own, shared = fitted(x, seen, 1, mass=mass, slopes=slopes)
    shared = jax.tree.map(lambda y: pad_axes(y, {1: tile}), shared)
    count, ranges = shared.keys.shape[1] // tile, _ranges(seen, c)
    split = Split(max(1, min(16, PROGRAMS // (count * b))))

    def kernel(own: OfQueries, shared: OfEntries, ranges: Ranges, out):
        own_tile, keys = pl.program_id(0), shared.keys[...]
        entries = None if shared.entries is None else shared.entries[...]
        begin, end = split.piece(ranges.begin[own_tile], ranges.end[own_tile], pl.program_id(2))

        def step(i, total):
            query = begin + i
            queries, weights = own.queries[query], own.head_weights[query]
            if own.mass is None:
                mass, visible = _of_range(own, query, own_tile, entries, scale)
            else:
                mass, visible = _of_chosen(own, query, own_tile, ranges.slot[own_tile, query])
            hits = hits_of(queries, keys)
            slopes = [ref[query] for ref in own.slopes]
            grad = score_gradient(hits, weights, mass, visible, slopes)
            error = hit_gradient(hits, weights, grad).astype(queries.dtype)
            return total + plgpu.dot(queries, error, trans_a=True)

        total = jnp.zeros((keys.shape[1], tile), jnp.float32)
        out[...] = jax.lax.fori_loop(0, end - begin, step, total)

    def of_row(y):
        return pl.BlockSpec((None, *y.shape[1:]), lambda i, b, p: (b, *(0 for _ in y.shape[1:])))

    def of_tile(y):
        return pl.BlockSpec((None, tile, y.shape[2]), lambda i, b, p: (b, i, 0))

    wide = shared.keys.shape[2]
    sums = pl.pallas_call(
        kernel,
        grid=(count, b, split.parts),
        in_specs=[
            jax.tree.map(of_row, own), jax.tree.map(of_tile, shared), jax.tree.map(of_row, ranges),
        ],
        out_specs=pl.BlockSpec((None, None, wide, tile), lambda i, b, p: (p, b, 0, i)),
        out_shape=jax.ShapeDtypeStruct((split.parts, b, wide, count * tile), jnp.float32),
        compiler_params=plgpu.CompilerParams(
            num_warps=TILES.warps, num_stages=RANGE_STAGES if mass is None else TILES.stages
        ),
        interpret=target_platform() != GPU,
        name="index_key_gradient",
    )(own, shared, ranges)
    return jnp.sum(sums, axis=0).mT[:, :c, :width].astype(x.keys.dtype)


def _ranges(seen: Seen, count: int) -> Ranges:
    """Find, by binary search, what belongs to each tile: chosen entries ascend."""
    slot = None
    if seen.chosen is not None:
        start = jnp.arange(0, count, TILES.entries)
        ascending = jnp.where(seen.chosen < 0, count, seen.chosen)
        find = jax.vmap(jax.vmap(lambda numbers: jnp.searchsorted(numbers, start)))
        slot = find(ascending).mT.astype(jnp.int32)
    return Ranges(*query_ranges(seen, count, TILES.entries), slot)


def _of_range(own: OfQueries, query, tile, entries, scale: float):
    """Return the mass of a tile of entries, and which of them a query attends to."""
    entry = tile * TILES.entries + jnp.arange(TILES.entries)
    visible = (entry >= own.first[query]) & (entry < own.end[query])
    size = min(HEADS, own.q.shape[1])

    def add_group(i, mass):
        group = pl.ds(i * size, size)
        logits = plgpu.dot(entries, own.q[query, group, :], trans_b=True) * (scale * LOG2_E)
        return mass + jnp.sum(jnp.exp2(logits - own.log_total[query, group][None, :]), axis=1)

    mass = jnp.zeros(TILES.entries, jnp.float32)
    mass = jax.lax.fori_loop(0, own.q.shape[1] // size, add_group, mass)
    return mass, visible


def _of_chosen(own: OfQueries, query, tile, first):
    """Return the same from what was kept: each slot's mass at the place of its entry."""
    slots, place = Slots(TILES.entries, own.chosen.shape[1]), jnp.arange(TILES.entries)
    slot = slots.slot(first, place)
    entry = own.chosen[query, slot]
    is_own = slots.own(tile, first, place, entry)
    there = is_own[:, None] & ((entry - tile * TILES.entries)[:, None] == place[None, :])
    mass = jnp.sum(jnp.where(there, own.mass[query, slot][:, None], 0.0), axis=0)
    return mass, jnp.sum(there.astype(jnp.int32), axis=0) > 0
