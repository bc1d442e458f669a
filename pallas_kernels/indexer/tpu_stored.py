"""The indexer over a cache on TPU: a row's scores stay in VMEM until the best are known.

The least score that is kept is found bit by bit, as in `tpu`. From the scores to numbers there is
no instruction, either: products with triangles of ones count what is taken before each entry, and
products with rows of a single one bring each place of the result what it is to look up.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.blocks import pad_axes
from pallas_kernels.codes import BYTES, GROUP, powers, value
from pallas_kernels.cost import estimate
from pallas_kernels.index_math import cdiv
from pallas_kernels.indexer.index import Steps, Tiled
from pallas_kernels.indexer.keys import even_first, is_packed
from pallas_kernels.indexer.order import NONE, sortable, threshold, tie_bound, to_bfloat16
from pallas_kernels.sparse_attention.index import last_block
from pallas_kernels.sparse_attention.tpu_queries import column, numbers_of, product
from pallas_kernels.target import TPU, target_platform

LANES = 128
TILED = Tiled(4096, 512, LANES)
HEADS = 16  # rows of a packed register: heads come in multiples of it
MEMORY = 48 * 2**20
MOST_ENTRIES = 2**18  # scores of 16 queries are then a third of the memory
LIMITS = f"at most {MOST_ENTRIES} entries"


def fits(channels: int, stored: Array) -> bool:
    """Say whether the kernel takes a cache of keys of so many channels."""
    return stored.shape[2] <= MOST_ENTRIES and (not is_packed(stored) or channels % GROUP == 0)


def select_stored(
    queries: Float[Array, "b t i j"], head_weights: Float[Array, "b t i"], stored: Array,
    layer: Int[Array, ""], end: Int[Array, "b t"], topk: int,
) -> Int[Array, "b t l"]:
    """Compute `reference.select_stored`."""
    packed, entries = is_packed(stored), stored.shape[2]
    # XLA lays bytes out with entries in lanes, and for the kernel in rows: of one layer alone.
    stored = jax.lax.dynamic_index_in_dim(stored, layer, keepdims=False)
    queries = pad_axes(even_first(queries) if packed else queries, {2: HEADS})
    b, t, heads, channels = queries.shape
    weights = pad_axes(head_weights.astype(jnp.float32), {2: HEADS}).reshape(b, 1, t * heads)
    last = last_block(jnp.max(end, axis=1), TILED.block)
    steps, kept = Steps(TILED.block, cdiv(entries, TILED.block)), cdiv(topk, LANES) * LANES
    rows = TILED.rows(steps.count)

    def kernel(last_ref, q_ref, weights_ref, end_ref, keys_ref, out_ref, order, column_ref):
        row, step = pl.program_id(0), pl.program_id(1)

        @pl.when(step == 0)
        def _():
            order[...] = jnp.full_like(order, NONE)
            column_ref[...] = column(weights_ref[...])

        def score_tile(tile, done):
            part = pl.ds(pl.multiple_of(tile * TILED.tile, TILED.tile), TILED.tile)
            keys = keys_ref[part, :]
            keys = _decoded(keys, channels, q_ref.dtype) if packed else keys.astype(q_ref.dtype)
            hits = product(q_ref[...].reshape(t * heads, channels), keys, 1, 1)
            found = jnp.maximum(hits, 0.0) * column_ref[...]
            found = jnp.sum(found.reshape(t, heads, TILED.tile), axis=1)
            found = to_bfloat16(found) if packed else found
            first = TILED.entry(step, tile)
            seen = first + numbers_of(t, TILED.tile, 1) < end_ref[...]
            found = jnp.where(seen, sortable(found), NONE)
            base = pl.multiple_of(TILED.row(step, tile), TILED.tile // LANES)
            for n in range(TILED.tile // LANES):
                order[:, pl.ds(base + n, 1), :] = found[:, None, n * LANES : (n + 1) * LANES]
            return done

        @pl.when(steps.wanted(step, 0, last_ref[row]))
        def _():
            jax.lax.fori_loop(0, TILED.block // TILED.tile, score_tile, 0)

        @pl.when(step == steps.count - 1)
        def _():
            chunks = TILED.chunks(last_ref[row])

            def choose(query, done):
                out_ref[pl.ds(query, 1), :] = _numbers_of_best(order.at[query], chunks, topk, kept)
                return done

            jax.lax.fori_loop(0, t, choose, 0)

    def of_row(b, s, *_):
        return b, 0, 0

    def of_keys(b, s, last):
        return b, steps.read(s, 0, last[b]), 0

    chosen = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, steps.count),
            in_specs=[
                pl.BlockSpec((None, t, heads, channels), lambda b, s, *_: (b, 0, 0, 0)),
                pl.BlockSpec((None, 1, t * heads), of_row),
                pl.BlockSpec((None, t, 1), of_row),
                pl.BlockSpec((None, TILED.block, stored.shape[2]), of_keys),
            ],
            out_specs=pl.BlockSpec((None, t, kept), of_row),
            scratch_shapes=[
                pltpu.VMEM((t, rows, LANES), jnp.int32), pltpu.VMEM((t * heads, 1), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((b, t, kept), jnp.int32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=MEMORY
        ),
        cost_estimate=estimate(2 * queries.size * stored.shape[1], queries, stored),
        interpret=target_platform() != TPU,
        name="select_stored",
    )(last, queries, weights, end[..., None], stored)
    return chosen[..., :topk]


def _decoded(stored: Int[Array, "s w"], channels: int, dtype) -> Float[Array, "s j"]:
    """Return packed keys as numbers, even channels first.

    A product with ones and zeros repeats the scales, which are powers of two: exact in bfloat16.
    """
    byte = stored.astype(jnp.int32)
    codes, scales = byte[:, : channels // 2], powers(byte[:, channels // 2 :])
    groups = scales.shape[1]
    group, channel = (numbers_of(groups, channels, axis) for axis in (0, 1))
    half = channels // 2
    own = jnp.where(channel >= half, channel - half, channel) - group * BYTES
    spread = ((own >= 0) & (own < BYTES)).astype(jnp.bfloat16)
    scales = product(scales.astype(jnp.bfloat16), spread, 1, 0)
    both = value(jnp.concatenate([codes & 15, codes >> 4], axis=1))  # whole registers
    return (both * scales).astype(dtype)


def _numbers_of_best(order, chunks, topk: int, kept: int) -> Int[Array, "1 kept"]:
    """Return the numbers of a query's best entries, ascending, then -1.

    Args:
      order: [rows, LANES], the entries' scores in the order of integers.
      chunks: how many of LANES rows have any.
    """

    def part(chunk):
        return order[pl.ds(pl.multiple_of(chunk * LANES, LANES), LANES), :]

    def count(holds) -> Int[Array, "1 1"]:
        def add(chunk, total):
            found = holds(part(chunk), TILED.number(chunk, *_places())).astype(jnp.int32)
            return total + jnp.sum(found.reshape(-1, 8, LANES), axis=0)

        total = jax.lax.fori_loop(0, chunks, add, jnp.zeros((8, LANES), jnp.int32))
        return jnp.sum(jnp.sum(total, axis=0, keepdims=True), axis=1, keepdims=True)

    zero = jnp.zeros((1, 1), jnp.int32)
    least = threshold(lambda x: count(lambda o, _: o >= x), topk, zero)
    free = topk - count(lambda o, _: o > least)
    bits = (order.shape[0] * LANES).bit_length()

    bound = tie_bound(lambda x: count(lambda o, e: (o == least) & (e < x)), free, bits, zero)

    def add_chunk(chunk, state):
        o = part(chunk)
        number = TILED.number(chunk, *_places())
        taken = (o > least) | ((o == least) & (number < bound) & (o != NONE))
        return _with_chunk(taken, chunk, *state)

    start = jnp.full((1, kept), -1, jnp.int32), jnp.zeros((1, 1), jnp.float32)
    return jax.lax.fori_loop(0, chunks, add_chunk, start)[0]


def _with_chunk(taken, chunk, numbers, before):
    """Put the numbers of what is taken of a chunk at their places in the result.

    Args:
      before: how many were taken of all chunks before.
    """
    taken = taken.astype(jnp.bfloat16)
    ones = jnp.ones((LANES, LANES), jnp.bfloat16)
    row, lane = _places()
    upto = (lane <= row).astype(jnp.bfloat16)  # of each row: itself and those before
    # Of each row, in all lanes: how many are taken of it, and of all rows up to it.
    of_row = product(taken, ones, 1, 0)
    end = before + product(upto, of_row.astype(jnp.bfloat16), 1, 0)
    # Transposed: of each row, in its lane, how many are taken up to each place of it.
    within = product(upto, taken, 1, 1).astype(jnp.bfloat16)
    place = numbers_of(LANES, numbers.shape[1], 1).astype(jnp.float32)
    first = (end - of_row)[:, 0:1]
    own = (place >= first) & (place < end[:, 0:1])  # the row whose entry a place of the result gets
    up_to_place = product(within, own.astype(jnp.bfloat16), 1, 0)
    rank = jnp.sum(jnp.where(own, place - first, 0.0), axis=0, keepdims=True)
    lane = jnp.sum((up_to_place <= rank).astype(jnp.int32), axis=0, keepdims=True)
    row = jnp.sum(jnp.where(own, numbers_of(*own.shape, 0), 0), axis=0, keepdims=True)
    total = end[LANES - 1 :, 0:1]
    here = (place[:1] >= before) & (place[:1] < total)
    return jnp.where(here, TILED.number(chunk, row, lane), numbers), total


def _places() -> tuple[Int[Array, "r l"], Int[Array, "r l"]]:
    """Return the row and the lane of each place of a chunk."""
    return numbers_of(LANES, LANES, 0), numbers_of(LANES, LANES, 1)
