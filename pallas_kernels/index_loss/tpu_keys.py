"""The gradient of the indexer's keys on TPU: a block of them, step by step over the queries."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.cost import estimate
from pallas_kernels.index_loss.tpu_blocks import (
    MEMORY,
    Fitted,
    Span,
    hit_gradient,
    hits_of,
    mass_of,
    score_gradient,
)
from pallas_kernels.sparse_attention.index import Blocks
from pallas_kernels.sparse_attention.tpu_keys import query_blocks
from pallas_kernels.sparse_attention.tpu_queries import LANES, attended, column, product
from pallas_kernels.target import TPU, target_platform


def key_gradient(x: Fitted, span: Span, blocks: Blocks, scale: float) -> Float[Array, "b c j"]:
    """Return the gradient of the keys."""
    (b, t), count = x.q.shape[:2], x.entries.shape[1] // blocks.entries

    def kernel(first_ref, end_ref, x: Fitted, out_ref, out):
        row, block, step = map(pl.program_id, range(3))

        @pl.when(step == 0)
        def _():
            out[...] = jnp.zeros_like(out)

        @pl.when((step >= first_ref[row, block]) & (step < end_ref[row, block]))
        def _():
            words = None if x.words is None else x.words[...]
            visible = attended(x.numbers[...], words, block, blocks)
            queries, weights = x.queries[...], column(x.head_weights[...])
            mass = mass_of(x.q[...], column(x.log_total[...]), x.entries[...], scale)
            hits = hits_of(queries, x.keys[...])
            grad = score_gradient(hits, weights, mass, visible, x.slopes[...])
            error = hit_gradient(hits, weights, grad).astype(queries.dtype)
            out[...] += product(error, queries.reshape(error.shape[0], -1), 0, 0)

        @pl.when(step == pl.num_programs(2) - 1)
        def _():
            out_ref[...] = out[...].astype(out_ref.dtype)

    def query_block(b, j, s, first, end):
        return blocks.clamped(s, first[b, j], end[b, j])

    def of_queries(y):
        rest = y.shape[2:]
        return pl.BlockSpec(
            (None, blocks.queries, *rest),
            lambda *at: (at[0], query_block(*at), *(0 for _ in rest)),
        )

    def of_block(y):
        return pl.BlockSpec(
            (None, None, *y.shape[2:]), lambda *at: (at[0], query_block(*at), 0, 0)
        )

    def own_block(y):
        return pl.BlockSpec((None, blocks.entries, y.shape[2]), lambda b, j, s, *_: (b, j, 0))

    def of_words(*at):
        return at[0], query_block(*at), blocks.word_block(at[1])

    specs = Fitted(
        of_queries(x.q), own_block(x.entries), of_block(x.log_total), of_queries(x.queries),
        of_block(x.head_weights), own_block(x.keys), of_queries(x.numbers),
        None if x.words is None else pl.BlockSpec((None, blocks.queries, LANES), of_words),
        of_queries(x.slopes),
    )
    # Half of the entries come before a query.
    flops = (x.q.size + 2 * x.queries.size) * x.keys.shape[1]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, count, t // blocks.queries),
            in_specs=[specs],
            out_specs=own_block(x.keys),
            scratch_shapes=[pltpu.VMEM((blocks.entries, x.keys.shape[2]), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(x.keys.shape, x.keys.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=MEMORY
        ),
        cost_estimate=estimate(flops, x, x.keys),
        interpret=target_platform() != TPU,
        name="index_key_gradient",
    )(*query_blocks(*span, count), x)
