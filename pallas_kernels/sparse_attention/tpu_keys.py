"""Gradients of keys and entries on TPU: a block of them, step by step over blocks of queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.cost import estimate
from pallas_kernels.sparse_attention.index import Blocks
from pallas_kernels.sparse_attention.tpu_queries import (
    LANES,
    MEMORY,
    Fitted,
    as_bias,
    attended,
    by_block,
    column,
    masked,
    numbers_of,
    product,
)
from pallas_kernels.target import TPU, target_platform


class Rows(NamedTuple):
    """What belongs to queries, as `tpu_queries.query_gradient` takes it."""

    log_total: Float[Array, "b t h"]
    drop: Float[Array, "b t h"]
    grad: Float[Array, "b t h k"]


def key_gradient(x: Fitted, rows: Rows, blocks: Blocks, scale: float) -> Float[Array, "b t k"]:
    """Return the gradient of the keys that windows see."""
    last = x.q.shape[1] // blocks.queries - 1

    def query_block(b, j, s):
        return blocks.query_block_read(j, s, last)

    def fold_if_seen(fold: Callable, numbers_ref):
        own, step = pl.program_id(1), pl.program_id(2)
        block = blocks.query_block(own, step)

        @pl.when(block <= last)
        def _():
            query = block * blocks.queries + numbers_of(blocks.queries, 1, 0)
            key = own * blocks.keys + numbers_of(blocks.queries, blocks.keys, 1)
            fold(blocks.shows(query, numbers_ref[:, 0:1], key))

    return _call(
        x, rows, blocks, scale, x.keys, blocks.keys, blocks.query_steps, query_block,
        fold_if_seen, [x.numbers], [],
    )


def entry_gradient(x: Fitted, rows: Rows, blocks: Blocks, scale: float) -> Float[Array, "b c k"]:
    """Return the gradient of the entries."""
    steps = x.q.shape[1] // blocks.queries
    ranges = query_blocks(x.first, x.last, x.entries.shape[1] // blocks.entries)

    def query_block(b, j, s, first, end):
        return blocks.clamped(s, first[b, j], end[b, j])

    def fold_if_seen(fold: Callable, seen_ref, first_ref, end_ref):
        row, own, step = map(pl.program_id, range(3))

        @pl.when((step >= first_ref[row, own]) & (step < end_ref[row, own]))
        def _():
            chosen = x.words is not None
            given = (None, seen_ref[...]) if chosen else (seen_ref[:, 1:3], None)
            fold(attended(*given, own, blocks))

    return _call(
        x, rows, blocks, scale, x.entries, blocks.entries, steps, query_block, fold_if_seen,
        [x.numbers if x.words is None else x.words],
        ranges,
    )


def query_blocks(
    first: Int[Array, "b z"], last: Int[Array, "b z"], count: int
) -> list[Int[Array, "b n"]]:
    """Return which blocks of queries may see any of each of `count` blocks: first and end.

    Neither bound falls along a row, so that these blocks are neighbours.

    Args:
      first: the blocks of entries that each block of queries sees.
    """
    own = jnp.arange(count)
    begin = jax.vmap(lambda last: jnp.searchsorted(last, own, side="left"))(last)
    end = jax.vmap(lambda first: jnp.searchsorted(first, own, side="right"))(first)
    return [x.astype(jnp.int32) for x in (begin, end)]


def _call(
    x: Fitted, rows: Rows, blocks: Blocks, scale: float, kv, size: int, steps: int,
    query_block: Callable, fold_if_seen: Callable, seen: list, prefetched: list,
) -> Array:
    """Return the gradient of key-values [b, s, k] in blocks of a size.

    Args:
      query_block: from a step of the grid to the block of queries that is in memory.
      fold_if_seen: takes the function that adds a step, to which it gives what is seen.
      seen: an array that it needs, [b, t, ...].
      prefetched: numbers that both need.
    """
    b, _, h, k = x.q.shape
    queries, own_rows = blocks.queries, blocks.queries * h

    def kernel(*refs):
        scalars, refs = refs[: len(prefetched)], refs[len(prefetched) :]
        kv_ref, q_ref, grad_ref, total_ref, drop_ref, *seen_refs, out_ref, out = refs

        @pl.when(pl.program_id(2) == 0)
        def _():
            out[...] = jnp.zeros_like(out)

        def fold(visible):
            q, grad = (ref[...].reshape(own_rows, k) for ref in (q_ref, grad_ref))
            kv = kv_ref[...]
            logits = masked(product(q, kv, 1, 1) * scale, as_bias(visible))
            weights = jnp.exp(logits - column(total_ref[...]))
            error = weights * (product(grad, kv, 1, 1) - column(drop_ref[...])) * scale
            out[...] += product(weights.astype(kv.dtype), grad, 0, 0)
            out[...] += product(error.astype(kv.dtype), q, 0, 0)

        fold_if_seen(fold, *seen_refs, *scalars)

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            out_ref[...] = out[...].astype(out_ref.dtype)

    def of_queries(b, j, s, *scalars):
        return b, query_block(b, j, s, *scalars), 0, 0

    def of_seen(b, j, s, *scalars):
        block = query_block(b, j, s, *scalars)
        return (b, block, 0) if seen[0].shape[2] == 3 else (b, block, blocks.word_block(j))

    def own(b, j, s, *_):
        return b, j, 0

    wide = pl.BlockSpec((None, queries, h, k), of_queries)
    number = pl.BlockSpec((None, None, 1, own_rows), of_queries)
    width = min(LANES, seen[0].shape[2])
    # Four products. Of the entries, half come before a query.
    pairs = kv.shape[0] * kv.shape[1] * steps * own_rows // (2 if prefetched else 1)
    operands = kv, x.q, rows.grad, *(by_block(y, own_rows) for y in rows[:2]), *seen
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(b, kv.shape[1] // size, steps),
            in_specs=[
                pl.BlockSpec((None, size, k), own), wide, wide, number, number,
                pl.BlockSpec((None, queries, width), of_seen),
            ],
            out_specs=pl.BlockSpec((None, size, k), own),
            scratch_shapes=[pltpu.VMEM((size, k), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(kv.shape, kv.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=MEMORY
        ),
        cost_estimate=estimate(8 * k * pairs, operands, kv),
        interpret=target_platform() != TPU,
        name="key_gradient",
    )(*prefetched, *operands)
