"""The indexer on TPU: the scores of a block of queries stay in VMEM until the best are known.

A TPU has no instruction to sort. The least score that is kept is found bit by bit, by counting:
32 passes over scores that never leave VMEM take less than the products they come from.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.blocks import pad_axes
from pallas_kernels.cost import estimate
from pallas_kernels.indexer.index import Steps
from pallas_kernels.indexer.order import NONE, sortable, threshold, tie_bound, to_bfloat16
from pallas_kernels.sparse_attention.index import first_block, last_block
from pallas_kernels.sparse_attention.tpu_queries import column
from pallas_kernels.target import TPU, target_platform

LANES = 128
WORD = LANES * 32  # entries whose bits fill a row of words
ENTRIES = 512  # scored in one step
QUERIES = 8  # of a block
HEADS = 16  # rows of a packed register: heads come in multiples of it
MEMORY = 48 * 2**20


class Operands(NamedTuple):
    """Arrays filled up to whole blocks."""

    queries: Float[Array, "b t i j"]
    weights: Float[Array, "b z 1 rows"]  # of a block's heads
    numbers: Int[Array, "b t 2"]  # first entry and end of entries
    keys: Float[Array, "b c j"]
    begin: Int[Array, "b z"]  # the blocks of entries that a block of queries sees
    last: Int[Array, "b z"]


def select(
    queries: Float[Array, "b t i j"], head_weights: Float[Array, "b t i"],
    keys: Float[Array, "b c j"], first: Int[Array, "b t"], end: Int[Array, "b t"], topk: int, *,
    rounded: bool = False,
) -> Int[Array, "b t w"]:
    """Return the choice of `reference.select` as `Bits` of the sparse attention's kernels."""
    x = _fitted(queries, head_weights, keys, first, end)
    b, t, heads, width = x.queries.shape
    steps, rows = Steps(ENTRIES, x.keys.shape[1] // ENTRIES), QUERIES * heads

    def kernel(begin_ref, last_ref, q_ref, weights_ref, numbers_ref, keys_ref, words, *scratch):
        row, block, step = map(pl.program_id, range(3))
        (order, weights), begin, last = scratch, begin_ref[row, block], last_ref[row, block]

        @pl.when(step == 0)
        def _():
            order[...] = jnp.full_like(order, NONE)
            weights[...] = column(weights_ref[...])

        @pl.when(steps.wanted(step, begin, last))
        def _():
            hits = jax.lax.dot_general(
                q_ref[...].reshape(rows, width), keys_ref[...], (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            found = jnp.maximum(hits, 0.0) * weights[...]
            found = jnp.sum(found.reshape(QUERIES, heads, ENTRIES), axis=1)
            found = to_bfloat16(found) if rounded else found
            entry = step * ENTRIES + _numbers(ENTRIES)
            seen = (entry >= numbers_ref[:, 0:1]) & (entry < numbers_ref[:, 1:2])
            order[:, pl.ds(step * ENTRIES, ENTRIES)] = jnp.where(seen, sortable(found), NONE)

        @pl.when(step == steps.count - 1)
        def _():
            _choose(order, words, begin, last, topk)

    def of_block(b, i, s, *_):
        return b, i, 0, 0

    def of_queries(b, i, s, *_):
        return b, i, 0

    def of_entries(b, i, s, begin, last):
        return b, steps.read(s, begin[b, i], last[b, i]), 0

    shape = jax.ShapeDtypeStruct((b, t, x.keys.shape[1] // 32), jnp.int32)
    words = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, t // QUERIES, steps.count),
            in_specs=[
                pl.BlockSpec((None, QUERIES, heads, width), of_block),
                pl.BlockSpec((None, None, 1, rows), of_block),
                pl.BlockSpec((None, QUERIES, 2), of_queries),
                pl.BlockSpec((None, ENTRIES, width), of_entries),
            ],
            out_specs=pl.BlockSpec((None, QUERIES, shape.shape[2]), of_queries),
            scratch_shapes=[
                pltpu.VMEM((QUERIES, x.keys.shape[1]), jnp.int32),
                pltpu.VMEM((rows, 1), jnp.float32),
            ],
        ),
        out_shape=shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=MEMORY
        ),
        # Of entries that come before a query: half of all.
        cost_estimate=estimate(x.queries.size * x.keys.shape[1], x, shape),
        interpret=target_platform() != TPU,
        name="select_entries",
    )(x.begin, x.last, x.queries, x.weights, x.numbers, x.keys)
    return words[:, : queries.shape[1]]


def _fitted(queries, head_weights, keys, first, end) -> Operands:
    queries = pad_axes(queries, {1: QUERIES, 2: HEADS, 3: LANES})
    b, t, heads, _ = queries.shape
    weights = pad_axes(head_weights.astype(jnp.float32), {1: QUERIES, 2: HEADS})
    after = ((0, 0), (0, t - first.shape[1]))
    first, end = (jnp.pad(x, after, mode="edge").astype(jnp.int32) for x in (first, end))
    least, most = (x.reshape(b, -1, QUERIES) for x in (first, end))
    least, most = jnp.min(least, axis=-1), jnp.max(most, axis=-1)
    begin, last = first_block(least, most, ENTRIES), last_block(most, ENTRIES)
    return Operands(
        queries, weights.reshape(b, -1, 1, QUERIES * heads), jnp.stack([first, end], axis=-1),
        pad_axes(keys, {1: WORD, 2: LANES}), begin, last,
    )


def _choose(order, words, begin, last, topk: int) -> None:
    """Write the bits of the best: those above a threshold, and the first that are equal to it."""

    def count(holds) -> Int[Array, "q 1"]:
        """Count, over all blocks that were scored, where a condition on order and entry holds."""

        def add(block, total):
            part = pl.ds(pl.multiple_of(block * ENTRIES, ENTRIES), ENTRIES)
            return total + holds(order[:, part], block * ENTRIES + _numbers(ENTRIES))

        zeros = jnp.zeros((QUERIES, ENTRIES), jnp.int32)
        total = jax.lax.fori_loop(begin, last + 1, add, zeros)
        return jnp.sum(total, axis=1, keepdims=True)

    zeros = jnp.zeros((QUERIES, 1), jnp.int32)
    least = threshold(lambda x: count(lambda o, _: (o >= x).astype(jnp.int32)), topk, zeros)
    free = topk - count(lambda o, _: (o > least).astype(jnp.int32))
    bits = order.shape[1].bit_length()

    bound = tie_bound(
        lambda x: count(lambda o, e: ((o == least) & (e < x)).astype(jnp.int32)), free, bits, zeros
    )
    for word in range(order.shape[1] // WORD):
        packed = jnp.zeros((QUERIES, LANES), jnp.int32)
        for bit in range(32):
            start = word * WORD + bit * LANES
            o, entry = order[:, pl.ds(start, LANES)], start + _numbers(LANES)
            taken = (o > least) | ((o == least) & (entry < bound) & (o != NONE))
            packed |= taken.astype(jnp.int32) << bit
        words[:, pl.ds(word * LANES, LANES)] = packed


def _numbers(columns: int) -> Int[Array, "q s"]:
    return jax.lax.broadcasted_iota(jnp.int32, (QUERIES, columns), 1)
