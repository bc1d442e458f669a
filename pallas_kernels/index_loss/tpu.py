"""The indexer's loss on TPU: blocks of queries against blocks of entries, step by step.

As in sparse attention, entries are read in whole blocks, and what a query has not chosen is masked.
Attention is made again from queries and entries wherever it is needed: kept, it would have a number
for every token and entry.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.cost import estimate
from pallas_kernels.index_loss.parts import Inputs, Slopes, Sums
from pallas_kernels.index_loss.reference import LOWEST
from pallas_kernels.index_loss.tpu_blocks import (
    MEMORY,
    Fitted,
    Span,
    blocks_for,
    fitted,
    hit_gradient,
    hits_of,
    mass_of,
    of_heads,
    score_gradient,
    scores_of,
)
from pallas_kernels.index_loss.tpu_keys import key_gradient
from pallas_kernels.indexer.index import Steps
from pallas_kernels.sparse_attention.index import Blocks
from pallas_kernels.sparse_attention.seen import Seen
from pallas_kernels.sparse_attention.tpu_queries import (
    LANES,
    attended,
    chosen_of,
    column,
    numbers_of,
    product,
)
from pallas_kernels.target import TPU, target_platform


def forward(x: Inputs, seen: Seen, best: Seen | None) -> tuple[Sums, None]:
    """Return sums over entries; nothing is kept of them."""
    (_, t, _, k), blocks = x.q.shape, blocks_for(x)
    size, (fit, span) = blocks.queries, fitted(x, seen, blocks, best=best)

    def start(x: Fitted, scratch):
        log_total, weights, top, *sums = scratch
        log_total[...], weights[...] = column(x.log_total[...]), column(x.head_weights[...])
        top[...] = jnp.full_like(top, LOWEST)
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)

    def fold(x: Fitted, block, scratch):
        log_total, weights, top, norm, total, gap, kept = scratch
        words = None if x.words is None else x.words[...]
        visible = attended(x.numbers[...], words if best is None else None, block, blocks)
        mass = mass_of(x.q[...], log_total[...], x.entries[...], k**-0.5)
        mass = jnp.where(visible, mass, 0.0)
        score = scores_of(hits_of(x.queries[...], x.keys[...]), weights[...], size)
        new_top = jnp.maximum(top[...], _over(jnp.max, jnp.where(visible, score, LOWEST)))
        learner = jnp.where(visible, jnp.exp(score - new_top), 0.0)
        norm[...] = norm[...] * jnp.exp(top[...] - new_top) + _over(jnp.sum, learner)
        top[...] = new_top
        total[...] += _over(jnp.sum, mass)
        gap[...] += _over(jnp.sum, jnp.where(mass > 0, mass * (jnp.log(mass) - score), 0.0))
        if best is not None:
            is_best = chosen_of(words, blocks.first_bit(block), blocks.entries)
            kept[...] += _over(jnp.sum, jnp.where(is_best, mass, 0.0))

    def finish(x: Fitted, out, scratch):
        _, _, top, norm, *sums = scratch
        log_norm = jnp.where(norm[...] > 0, top[...] + jnp.log(norm[...]), 0.0)
        place = numbers_of(size, len(Sums._fields), 1)
        found = jnp.broadcast_to(log_norm, place.shape)
        for i, ref in enumerate(sums):
            found = jnp.where(place == i + 1, ref[...], found)
        out[0][...] = found

    shape = jax.ShapeDtypeStruct((*fit.q.shape[:2], len(Sums._fields)), jnp.float32)
    (found,) = _call(
        fit, span, blocks, start, fold, finish, [shape], [(size, 1)] * 5, "index_sums"
    )
    return Sums(*jnp.moveaxis(found[:, :t], 2, 0)), None


def gradients(x: Inputs, seen: Seen, slopes: Slopes, mass: None) -> tuple[Array, Array, Array]:
    """Return the gradients of the indexer's queries, head weights and keys."""
    (_, t, i, j), blocks, scale = x.queries.shape, blocks_for(x), x.q.shape[3] ** -0.5
    fit, span = fitted(x, seen, blocks, slopes=slopes)
    heads, width = fit.queries.shape[2:]

    def start(x: Fitted, scratch):
        log_total, weights, *sums = scratch
        log_total[...], weights[...] = column(x.log_total[...]), column(x.head_weights[...])
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)

    def fold(x: Fitted, block, scratch):
        log_total, weights, of_queries, of_weights = scratch
        words = None if x.words is None else x.words[...]
        visible, keys = attended(x.numbers[...], words, block, blocks), x.keys[...]
        mass = mass_of(x.q[...], log_total[...], x.entries[...], scale)
        hits = hits_of(x.queries[...], keys)
        grad = score_gradient(hits, weights[...], mass, visible, x.slopes[...])
        error = hit_gradient(hits, weights[...], grad).astype(keys.dtype)
        of_queries[...] += product(error, keys, 1, 0)
        of_hits = (hits * of_heads(grad, hits.shape[0])).reshape(blocks.queries, heads, -1)
        of_weights[...] += jnp.sum(of_hits, axis=2)

    def finish(x: Fitted, out, scratch):
        queries_out, weights_out = out
        queries_out[...] = scratch[2][...].astype(queries_out.dtype).reshape(queries_out.shape)
        weights_out[...] = scratch[3][...]

    shapes = [
        jax.ShapeDtypeStruct(fit.queries.shape, fit.queries.dtype),
        jax.ShapeDtypeStruct(fit.queries.shape[:3], jnp.float32),
    ]
    sums = [(blocks.queries * heads, width), (blocks.queries, heads)]
    grad_queries, grad_weights = _call(
        fit, span, blocks, start, fold, finish, shapes, sums, "index_query_gradient"
    )
    return (
        grad_queries[:, :t, :i, :j], grad_weights[:, :t, :i].astype(x.head_weights.dtype),
        key_gradient(fit, span, blocks, scale)[:, : x.keys.shape[1], :j],
    )


def _over(reduce: Callable, x: Float[Array, "q s"]) -> Float[Array, "q 1"]:
    return reduce(x, axis=1, keepdims=True)


def _call(
    x: Fitted, span: Span, blocks: Blocks, start: Callable, fold: Callable, finish: Callable,
    outputs: list, sums: list[tuple[int, int]], name: str,
) -> list[Array]:
    """Run a kernel for each block of queries, step by step over the entries that it attends to.

    Args:
      start: prepares the scratch memory: columns of log totals and head weights, and `sums`.
      fold: adds a block of entries to it.
      finish: writes the outputs from it.
    """
    steps, count = Steps(blocks.entries, x.entries.shape[1] // blocks.entries), len(outputs)

    def kernel(first_ref, last_ref, x: Fitted, *refs):
        (row, block, step), out, scratch = map(pl.program_id, range(3)), refs[:count], refs[count:]
        pl.when(step == 0)(lambda: start(x, scratch))
        wanted = steps.wanted(step, first_ref[row, block], last_ref[row, block])
        pl.when(wanted)(lambda: fold(x, step, scratch))
        pl.when(step == steps.count - 1)(lambda: finish(x, out, scratch))

    def block_read(b, i, s, first, last):
        return steps.read(s, first[b, i], last[b, i])

    def own(y):
        rest = y.shape[2:]
        return pl.BlockSpec(
            (None, blocks.queries, *rest), lambda b, i, s, *_: (b, i, *(0 for _ in rest))
        )

    def of_block(y):
        return pl.BlockSpec((None, None, *y.shape[2:]), lambda b, i, s, *_: (b, i, 0, 0))

    def of_entries(y):
        return pl.BlockSpec(
            (None, blocks.entries, y.shape[2]), lambda *at: (at[0], block_read(*at), 0)
        )

    def of_words(*at):
        return at[0], at[1], blocks.word_block(block_read(*at))

    specs = Fitted(
        own(x.q), of_entries(x.entries), of_block(x.log_total), own(x.queries),
        of_block(x.head_weights), of_entries(x.keys), own(x.numbers),
        None if x.words is None else pl.BlockSpec((None, blocks.queries, LANES), of_words),
        None if x.slopes is None else own(x.slopes),
    )
    b, t = x.q.shape[:2]
    columns = [(y.shape[3], 1) for y in (x.log_total, x.head_weights)]
    # Half of the entries come before a query.
    products = x.q.size + x.queries.size * (1 if x.slopes is None else 2)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, t // blocks.queries, steps.count),
            in_specs=[specs],
            out_specs=[own(y) for y in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in (*columns, *sums)],
        ),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=MEMORY
        ),
        cost_estimate=estimate(products * x.entries.shape[1], x, outputs),
        interpret=target_platform() != TPU,
        name=name,
    )(*span, x)
