"""Gradient of chosen entries on GPU, from what each query gives to each entry that it chose.

Over all queries, as `gpu_keys` goes, most products are for entries that a query did not choose if
there are many. Here programs of queries write what their chosen entries get, for a part of the
queries at a time; programs of entries then add up what is theirs, in the order of the queries, so
that bits do not depend on scheduling.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.blocks import pad_axes
from pallas_kernels.index_math import cdiv
from pallas_kernels.sparse_attention.gpu_queries import LOG2_E, Rows
from pallas_kernels.sparse_attention.index import Entries, Shares
from pallas_kernels.target import GPU, target_platform


class Tiles(NamedTuple):
    """How the work is cut up."""

    heads: int  # of a query in one program
    entries: int  # whose shares are computed at a time
    shares: int  # added up at a time
    warps: int
    stages: int  # tiles whose loads are under way


TILES = Tiles(64, 32, 8, 8, 2)
BYTES = 2**29  # of the shares of a part of the queries, at most
# A pair of a query and an entry takes 8 h k operations in either form, and 8 k bytes here. On an
# H100 that is about 2.5 times the time at 64 heads; over all queries half of the pairs are masked
# because the entry comes later. Not measured; of short documents in long rows it takes less.
MANY = 6


def pays(entries: int, chosen: int) -> bool:
    """Say whether there are so many entries that this form should be the faster."""
    return entries > MANY * chosen


def chosen_gradient(
    rows: Rows, entries: Float[Array, "b c k"], chosen: Int[Array, "b t l"], *, scale: float
) -> Float[Array, "b c k"]:
    """Return the gradient of the entries, of which queries see the chosen ones.

    Args:
      chosen: numbers of entries, each once; negative: none.
    """
    (b, c, k), heads = entries.shape, min(TILES.heads, rows.q.shape[2])
    chosen = jnp.where(chosen < 0, -1, chosen + jnp.arange(b)[:, None, None] * c)
    chosen = pad_axes(chosen, {2: TILES.entries}, fill=-1)
    shares = Shares(chosen.shape[2], rows.q.shape[2] // heads)
    queries = [x.reshape(-1, *x.shape[2:]) for x in (*rows, chosen)]
    count, flat = len(queries[0]), entries.reshape(b * c, k)
    part = min(max(1, BYTES // (4 * shares.of_query * k)), count)

    def add(i, total):
        # The last part may begin earlier, to end with the queries; those before gave already.
        start = jnp.minimum(i * part, count - part)
        *own, chosen = (jax.lax.dynamic_slice_in_dim(x, start, part) for x in queries)
        fresh = start + jnp.arange(part) >= i * part
        chosen = jnp.where(fresh[:, None], chosen, -1)
        given = _shares(Rows(*own), flat, chosen, heads, scale)
        return _add_up(total, given, chosen, shares)

    total = jnp.zeros(flat.shape, jnp.float32)
    total = jax.lax.fori_loop(0, cdiv(count, part), add, total)
    return total.reshape(entries.shape).astype(entries.dtype)


def _shares(
    rows: Rows, entries: Float[Array, "c k"], chosen: Int[Array, "t l"], heads: int, scale: float
) -> Float[Array, "t g l k"]:
    """Return what each query and group of heads gives to each chosen entry.

    Nothing is written for tiles behind the last chosen one.
    """
    tiles, (t, slots), k = TILES, chosen.shape, entries.shape[1]

    last = jnp.max(jnp.where(chosen >= 0, jnp.arange(slots), -1), axis=1)
    used = cdiv(last + 1, tiles.entries).astype(jnp.int32)

    def kernel(q_ref, grad_ref, total_ref, drop_ref, entries_ref, chosen_ref, used_ref, out_ref):
        q, grad = q_ref[...], grad_ref[...]
        log_total, drop = total_ref[...] * LOG2_E, drop_ref[...]

        def tile(i, done):
            part = pl.ds(i * tiles.entries, tiles.entries)
            entry = chosen_ref[part]
            kv = entries_ref[jnp.maximum(entry, 0), :]
            logits = plgpu.dot(q, kv, trans_b=True) * (scale * LOG2_E)
            logits = jnp.where((entry >= 0)[None, :], logits, -jnp.inf)
            weights = jnp.exp2(logits - log_total[:, None])
            error = weights * (plgpu.dot(grad, kv, trans_b=True) - drop[:, None]) * scale
            given = plgpu.dot(grad, weights.astype(kv.dtype), trans_a=True)
            given += plgpu.dot(q, error.astype(kv.dtype), trans_a=True)
            out_ref[part, :] = given.T
            return done + 1

        jax.lax.fori_loop(0, used_ref[...], tile, jnp.int32(0))

    groups = rows.q.shape[1] // heads
    of_rows = pl.BlockSpec((None, heads, k), lambda i, g: (i, g, 0))
    of_row = pl.BlockSpec((None, heads), lambda i, g: (i, g))
    return pl.pallas_call(
        kernel,
        grid=(t, groups),
        in_specs=[
            of_rows, of_rows, of_row, of_row,
            pl.BlockSpec(entries.shape, lambda i, g: (0, 0)),
            pl.BlockSpec((None, slots), lambda i, g: (i, 0)),
            pl.BlockSpec((None,), lambda i, g: i),
        ],
        out_specs=pl.BlockSpec((None, None, slots, k), lambda i, g: (i, g, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((t, groups, slots, k), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=target_platform() != GPU,
        name="entry_shares",
    )(*rows, entries, chosen, used)


def _add_up(
    total: Float[Array, "c k"], given: Float[Array, "t g l k"], chosen: Int[Array, "t l"],
    shares: Shares,
) -> Float[Array, "c k"]:
    """Add to each entry what queries give it."""
    (count, k), tiles = total.shape, Entries(TILES.shares)
    owner = jnp.where(chosen < 0, count, chosen).reshape(-1)
    order = jnp.argsort(owner, stable=True)  # the entries' lists of slots, one after the other
    start = jnp.searchsorted(owner[order], jnp.arange(count + 1))
    order, start = order.astype(jnp.int32), start.astype(jnp.int32)

    def kernel(total_ref, given_ref, order_ref, start_ref, out_ref):
        entry = pl.program_id(0)
        begin, end = start_ref[entry], start_ref[entry + 1]

        def tile(i, sum_):
            place = tiles.entry(begin, i, jnp.arange(tiles.tile))
            slot = order_ref[tiles.row(place, end)]
            for group in range(shares.groups):
                value = given_ref[shares.row(slot, group), :]
                value = jnp.where(tiles.sees(end, place)[:, None], value, 0.0)
                sum_ += jnp.sum(value, axis=0)
            return sum_

        @pl.when(end > begin)
        def _():
            out_ref[...] = jax.lax.fori_loop(0, tiles.tiles(begin, end), tile, total_ref[...])

    own = pl.BlockSpec((None, k), lambda i: (i, 0))
    operands = given.reshape(-1, k), order, start
    whole = [pl.BlockSpec(x.shape, partial(_nowhere_else, x.ndim)) for x in operands]
    return pl.pallas_call(
        kernel,
        grid=(count,),
        in_specs=[own, *whole],
        out_specs=own,
        out_shape=jax.ShapeDtypeStruct(total.shape, total.dtype),
        input_output_aliases={0: 0},  # an entry that nobody chose stays as it is
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=target_platform() != GPU,
        name="add_shares",
    )(total, *operands)


def _nowhere_else(axes: int, i) -> tuple[int, ...]:
    return (0,) * axes
