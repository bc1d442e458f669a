"""Gradients of keys and entries on GPU: a program for each tile of them, over the queries.

A tile's rows are the rows of the matrix products, the heads of one query after the other their
columns. Where tiles are few, several programs share the queries of one; their sums are added up
in order, so that bits do not depend on which program is first.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.blocks import pad_axes
from pallas_kernels.index_math import div, mod
from pallas_kernels.sparse_attention.gpu_chosen import chosen_gradient, pays
from pallas_kernels.sparse_attention.gpu_queries import LOG2_E, Rows
from pallas_kernels.sparse_attention.index import Bits, Split, Window
from pallas_kernels.sparse_attention.seen import Seen, pack_chosen
from pallas_kernels.target import GPU, target_platform


class Tiles(NamedTuple):
    """How the work is cut up."""

    keys: int  # of a tile
    heads: int  # of a query in one step
    warps: int
    stages: int  # steps whose loads are under way


TILES = Tiles(32, 64, 8, 1)
PROGRAMS = 264  # two for each of an H100's multiprocessors, to share them evenly


def key_gradient(
    rows: Rows, keys: Float[Array, "b t k"], seen: Seen, *, window: int, scale: float
) -> Float[Array, "b t k"]:
    """Return the gradient of the keys that windows see."""
    tokens, see = keys.shape[1], Window(window, TILES.keys)

    def queries(tile):
        return see.queries(tile, tokens)

    def visible(query, tile, first_key_ref):
        return see.seen_by(query, first_key_ref[query], _numbers(tile))

    return _gradient(rows, keys, [seen.first_key], (), queries, visible, scale)


def entry_gradient(
    rows: Rows, entries: Float[Array, "b c k"], seen: Seen, *, scale: float
) -> Float[Array, "b c k"]:
    """Return the gradient of the entries."""
    count = entries.shape[1]
    if seen.chosen is not None and pays(count, seen.chosen.shape[2]):
        return chosen_gradient(rows, entries, seen.chosen, scale=scale)
    ranges = query_ranges(seen, count, TILES.keys)

    def queries(tile, begin_ref, end_ref):
        return begin_ref[tile], end_ref[tile]

    if seen.chosen is None:

        def visible(query, tile, first_ref, end_ref):
            entry = _numbers(tile)
            return (entry >= first_ref[query]) & (entry < end_ref[query])

        return _gradient(
            rows, entries, [seen.first, seen.end], ranges, queries, visible, scale
        )
    bits = Bits(count)

    def chosen(query, tile, words_ref):
        start = tile * TILES.keys
        words = words_ref[query, pl.ds(bits.word(start), TILES.keys)]
        return (words >> bits.bit(start)) & 1 == 1

    return _gradient(
        rows, entries, [pack_chosen(seen.chosen, count)], ranges, queries, chosen, scale
    )


def query_ranges(
    seen: Seen, count: int, tile: int
) -> tuple[Int[Array, "b n"], Int[Array, "b n"]]:
    """Return which queries may see any of each tile of `count` entries: first and end.

    Both bounds of what is seen grow along a row, so that these queries are neighbours.
    """
    start = jnp.arange(0, count, tile)
    after = jnp.minimum(start + tile, count)
    begin = jax.vmap(lambda end: jnp.searchsorted(end, start, side="right"))(seen.end)
    end = jax.vmap(lambda first: jnp.searchsorted(first, after))(seen.first)
    return begin.astype(jnp.int32), end.astype(jnp.int32)


def _numbers(tile) -> Int[Array, " s"]:
    """Return the numbers of a tile's rows."""
    return tile * TILES.keys + jnp.arange(TILES.keys)


def _gradient(rows: Rows, kv, per_query: list, ranges: tuple, queries, visible, scale: float):
    """Return the gradient of key-values [b, s, k].

    Args:
      per_query: arrays [b, t, ...] that `visible` needs.
      ranges: arrays [b, tiles] that `queries` needs.
      queries: from a tile to the range of queries that may see any of it.
      visible: from a query and a tile to which rows of it the query sees.
    """
    tiles, (b, length, width) = TILES, kv.shape
    heads = min(tiles.heads, rows.q.shape[2])
    groups = rows.q.shape[2] // heads
    kv = pad_axes(kv, {1: tiles.keys})
    count = kv.shape[1] // tiles.keys
    split = Split(max(1, min(16, PROGRAMS // (count * b))))

    def kernel(kv_ref, q_ref, grad_ref, total_ref, drop_ref, *refs):
        *refs, out_ref = refs
        query_refs, range_refs = refs[: len(per_query)], refs[len(per_query) :]
        tile, kv_rows = pl.program_id(0), kv_ref[...]
        begin, end = split.piece(*queries(tile, *range_refs), pl.program_id(2))

        def step(i, out):
            query, group = begin + div(i, groups), pl.ds(mod(i, groups) * heads, heads)
            q, grad = q_ref[query, group, :], grad_ref[query, group, :]
            log_total, drop = total_ref[query, group] * LOG2_E, drop_ref[query, group]
            seen = visible(query, tile, *query_refs)
            logits = plgpu.dot(q, kv_rows, trans_b=True) * (scale * LOG2_E)
            logits = jnp.where(seen[None, :], logits, -jnp.inf)
            weights = jnp.exp2(logits - log_total[:, None])
            error = weights * (plgpu.dot(grad, kv_rows, trans_b=True) - drop[:, None]) * scale
            out += plgpu.dot(grad, weights.astype(kv_rows.dtype), trans_a=True)
            return out + plgpu.dot(q, error.astype(kv_rows.dtype), trans_a=True)

        out = jnp.zeros((width, tiles.keys), jnp.float32)
        out_ref[...] = jax.lax.fori_loop(0, (end - begin) * groups, step, out)

    def whole(x):
        return pl.BlockSpec((None, *x.shape[1:]), lambda i, b, p: (b, *(0 for _ in x.shape[1:])))

    operands = [*rows, *per_query, *ranges]
    sums = pl.pallas_call(
        kernel,
        grid=(count, b, split.parts),
        in_specs=[
            pl.BlockSpec((None, tiles.keys, width), lambda i, b, p: (b, i, 0)),
            *map(whole, operands),
        ],
        out_specs=pl.BlockSpec((None, None, width, tiles.keys), lambda i, b, p: (p, b, 0, i)),
        out_shape=jax.ShapeDtypeStruct((split.parts, b, width, kv.shape[1]), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=target_platform() != GPU,
        name="key_gradient",
    )(kv, *operands)
    return jnp.sum(sums, axis=0).mT[:, :length].astype(kv.dtype)
