"""Sparse attention on TPU: a block of queries with all heads against blocks of keys and entries.

Rows cannot be gathered at the pace of the matrix units: 512 rows of a kilobyte take some 5,000
cycles of vector loads and stores, the products with 64 heads 640. So entries are read in whole
blocks, without those that no query of the block sees, and what a query has not chosen is masked, by
a bit for each entry. Up to 8,192 tokens that is at most twice the operations of the choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.blocks import pad_axes
from pallas_kernels.cost import estimate
from pallas_kernels.index_math import cdiv
from pallas_kernels.sparse_attention.index import Blocks, first_block, last_block
from pallas_kernels.sparse_attention.seen import Seen, pack_chosen
from pallas_kernels.target import TPU, target_platform

ROWS = 1024  # heads of queries in one block
KEYS, ENTRIES = 128, 512  # of a block
LANES = 128
HEADS = 16  # rows of a packed register: heads come in multiples of it
MEMORY = 32 * 2**20


class Fitted(NamedTuple):
    """Operands filled up with zeros to whole blocks."""

    q: Float[Array, "b t h k"]
    keys: Float[Array, "b s k"]
    entries: Float[Array, "b c k"] | None
    sink: Float[Array, " h"]
    numbers: Int[Array, "b t 3"]  # first key; first entry and end of entries
    words: Int[Array, "b t w"] | None  # chosen entries, as `Bits`
    first: Int[Array, "b z"]  # the blocks of entries that a block of queries sees
    last: Int[Array, "b z"]


def blocks_of(heads: int, window: int, before: int = 0) -> Blocks:
    """Return how the work is cut up.

    Args:
      before: keys in front of the first query's own; they are filled up to whole blocks.
    """
    queries = max(1, min(KEYS, ROWS // (cdiv(heads, HEADS) * HEADS)))
    before = cdiv(before, KEYS) * KEYS
    return Blocks(window, 1 << (queries.bit_length() - 1), KEYS, ENTRIES, before)


def fitted(q, keys, entries, sink, seen: Seen, blocks: Blocks) -> Fitted:
    """Fill up to whole blocks; queries past the end see nothing."""
    t, words = seen.first_key.shape[1], None
    added = blocks.before - (keys.shape[1] - t)
    keys = pad_axes(jnp.pad(keys, ((0, 0), (added, 0), (0, 0))), {1: KEYS, 2: LANES})
    q, sink = fitted_rows(q), pad_axes(sink.astype(jnp.float32), {0: HEADS})
    after = ((0, 0), (0, q.shape[1] - t))
    first_key = seen.first_key.astype(jnp.int32) + added
    first_key = jnp.pad(first_key, after, constant_values=keys.shape[1])
    if entries is None:
        first = end = jnp.zeros_like(first_key)
    else:
        first, end = (
            jnp.pad(x.astype(jnp.int32), after, mode="edge") for x in (seen.first, seen.end)
        )
        words = seen.words
        if words is None and seen.chosen is not None:
            words = pack_chosen(seen.chosen, entries.shape[1])
        if words is not None:
            words = jnp.pad(words, (*after, (0, 0)))
        entries = pad_axes(entries, {1: ENTRIES, 2: LANES})
    numbers = jnp.stack([first_key, first, end], axis=-1)
    least, most = (x.reshape(x.shape[0], -1, blocks.queries) for x in (first, end))
    least, most = jnp.min(least, axis=-1), jnp.max(most, axis=-1)
    return Fitted(
        q, keys, entries, sink, numbers, words,
        first_block(least, most, ENTRIES), last_block(most, ENTRIES),
    )


def fitted_rows(x: Array) -> Array:
    """Fill up an array [b, t, h, k] or [b, t, h] as the queries are."""
    return pad_axes(x, {1: KEYS, 2: HEADS, 3: LANES})


def attend(
    x: Fitted, blocks: Blocks, scale: float
) -> tuple[Float[Array, "b t h k"], Float[Array, "b t h"]]:
    """Return the output and the logarithm of the softmax's total."""
    rows = blocks.queries * x.q.shape[2]

    def kernel(first_ref, last_ref, q_ref, sink_ref, *refs):
        *kv_refs, out_ref, total_ref, top, total, out = refs
        q = q_ref[...].reshape(rows, q_ref.shape[-1])

        @pl.when(pl.program_id(2) == 0)
        def _():
            # The sink is part of every softmax, so that it makes a finite first maximum.
            top[...] = column(sink_ref[...])
            total[...] = jnp.ones_like(total)
            out[...] = jnp.zeros_like(out)

        def fold(kv, bias):
            fold_softmax(masked(product(q, kv, 1, 1) * scale, bias), kv, top, total, out)

        _fold_step(blocks, first_ref, last_ref, kv_refs, fold)

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            out_ref[...] = (out[...] / total[...]).astype(out_ref.dtype).reshape(out_ref.shape)
            total_ref[...] = _row(top[...] + jnp.log(total[...]))

    sinks = by_block(jnp.broadcast_to(x.sink, x.q.shape[:3]), rows)
    out, log_total = _call(
        kernel, x, blocks, [sinks], name="attend", products=2, outputs=[x.q, None],
        scratch=[(rows, 1), (rows, 1), (rows, x.q.shape[-1])],
    )
    return out, log_total.reshape(x.q.shape[:3])


def query_gradient(
    x: Fitted, log_total: Float[Array, "b t h"], drop: Float[Array, "b t h"],
    grad: Float[Array, "b t h k"], blocks: Blocks, scale: float,
) -> Float[Array, "b t h k"]:
    """Return the gradient of the queries.

    Args:
      drop: what a logit's gradient loses by the softmax's total.
    """
    rows = blocks.queries * x.q.shape[2]

    def kernel(first_ref, last_ref, q_ref, grad_ref, total_ref, drop_ref, *refs):
        *kv_refs, out_ref, log_total, drop, out = refs
        q, grad = (ref[...].reshape(rows, ref.shape[-1]) for ref in (q_ref, grad_ref))

        @pl.when(pl.program_id(2) == 0)
        def _():
            log_total[...], drop[...] = column(total_ref[...]), column(drop_ref[...])
            out[...] = jnp.zeros_like(out)

        def fold(kv, bias):
            weights = jnp.exp(masked(product(q, kv, 1, 1) * scale, bias) - log_total[...])
            error = weights * (product(grad, kv, 1, 1) - drop[...])
            out[...] += product(error.astype(kv.dtype), kv, 1, 0)

        _fold_step(blocks, first_ref, last_ref, kv_refs, fold)

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            out_ref[...] = (out[...] * scale).astype(out_ref.dtype).reshape(out_ref.shape)

    own = [grad, by_block(log_total, rows), by_block(drop, rows)]
    (out,) = _call(
        kernel, x, blocks, own, name="query_gradient", products=3, outputs=[x.q],
        scratch=[(rows, 1), (rows, 1), (rows, x.q.shape[-1])],
    )
    return out


def fold_softmax(logits: Float[Array, "rows s"], kv: Float[Array, "s k"], top, total, out) -> None:
    """Fold a block of key-values into a softmax: references to its maximum, total and output."""
    new_top = jnp.maximum(top[...], jnp.max(logits, axis=1, keepdims=True))
    weights, shrink = jnp.exp(logits - new_top), jnp.exp(top[...] - new_top)
    top[...] = new_top
    total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
    out[...] = out[...] * shrink + product(weights.astype(kv.dtype), kv, 1, 0)


def _fold_step(blocks: Blocks, first_ref, last_ref, kv_refs, fold: Callable) -> None:
    """Fold this step's block of keys or entries, unless no query of the block sees any of it.

    Args:
      kv_refs: of `numbers`, keys and, if there are any, entries and the words of chosen ones.
      fold: takes a block of key-values and what is added to their logits, 0 or -inf.
    """
    numbers_ref, keys_ref, *entry_refs = kv_refs
    row, block, step = map(pl.program_id, range(3))
    query = blocks.query(block, numbers_of(blocks.queries, 1, 0))
    key_block = blocks.key_block(block, step)

    @pl.when((step < blocks.window_steps) & (key_block >= 0))
    def _():
        key = key_block * blocks.keys + numbers_of(blocks.queries, blocks.keys, 1)
        fold(keys_ref[...], as_bias(blocks.shows(query, numbers_ref[:, 0:1], key)))

    if not entry_refs:
        return
    entries_ref, *words_ref = entry_refs
    entry_block = blocks.entry_block(step)
    wanted = (entry_block >= first_ref[row, block]) & (entry_block <= last_ref[row, block])

    @pl.when(wanted & (entry_block >= 0))
    def _():
        words = words_ref[0][...] if words_ref else None
        fold(entries_ref[...], as_bias(attended(numbers_ref[:, 1:3], words, entry_block, blocks)))


def attended(
    numbers: Int[Array, "q 2"] | None, words: Int[Array, "q 128"] | None, block, blocks: Blocks
) -> Bool[Array, "q s"]:
    """Return which entries of a block queries attend to: chosen ones or, without, of a range.

    Args:
      numbers: first and end of the range.
    """
    if words is not None:
        return chosen_of(words, blocks.first_bit(block), blocks.entries)
    entry = block * blocks.entries + numbers_of(blocks.queries, blocks.entries, 1)
    return (entry >= numbers[:, 0:1]) & (entry < numbers[:, 1:2])


def chosen_of(words: Int[Array, "q 128"], first_bit, entries: int):
    """Return which entries of a block are chosen: 128 for each bit from the first on."""
    bits = [(words >> (first_bit + i)) & 1 for i in range(entries // LANES)]
    return jnp.concatenate(bits, axis=1) == 1


def _call(
    kernel, x: Fitted, blocks: Blocks, own, *, name: str, products: int, outputs, scratch
) -> list[Array]:
    """Run a kernel for each block of queries, step by step over the keys and entries it sees.

    Args:
      own: what belongs to blocks of queries, beside q itself.
      products: matrix products of queries, as wide as q, with what they see.
      outputs: an array shaped as each output; None: one number for each head.
    """
    b, t, h, k = x.q.shape
    queries, z = blocks.queries, t // blocks.queries
    numbers = jax.ShapeDtypeStruct((b, z, 1, queries * h), jnp.float32)
    shapes = [numbers if y is None else jax.ShapeDtypeStruct(y.shape, y.dtype) for y in outputs]
    steps = blocks.window_steps

    def rows_spec(y):
        if y.ndim == 4 and y.shape[2] == h:
            return pl.BlockSpec((None, queries, h, k), lambda b, i, s, *_: (b, i, 0, 0))
        return pl.BlockSpec((None, None, 1, queries * h), lambda b, i, s, *_: (b, i, 0, 0))

    def key_block(b, i, s, *_):
        return b, blocks.key_block_read(i, s), 0

    operands = [x.q, *own]
    specs = [rows_spec(y) for y in operands]
    operands += [x.numbers, x.keys]
    specs += [
        pl.BlockSpec((None, queries, 3), lambda b, i, s, *_: (b, i, 0)),
        pl.BlockSpec((None, blocks.keys, k), key_block),
    ]
    if x.entries is not None:
        steps += x.entries.shape[1] // blocks.entries

        def entry_block(b, i, s, first, last):
            return b, blocks.entry_block_read(s, first[b, i], last[b, i]), 0

        operands.append(x.entries)
        specs.append(pl.BlockSpec((None, blocks.entries, k), entry_block))
    if x.words is not None:

        def word_block(b, i, s, first, last):
            return b, i, blocks.word_block(blocks.entry_block_read(s, first[b, i], last[b, i]))

        operands.append(x.words)
        specs.append(pl.BlockSpec((None, queries, LANES), word_block))
    # Windows are read in whole blocks; half of the entries come before a query.
    seen = blocks.window_steps * blocks.keys
    seen += 0 if x.entries is None else x.entries.shape[1] // 2
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, z, steps),
            in_specs=specs,
            out_specs=[rows_spec(y) for y in shapes],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=MEMORY
        ),
        cost_estimate=estimate(2 * products * x.q.size * seen, operands, shapes),
        interpret=target_platform() != TPU,
        name=name,
    )(x.first, x.last, *operands)


def by_block(x: Float[Array, "b t h"], rows: int) -> Float[Array, "b z 1 rows"]:
    """Lay out a number for each head of each query on lanes."""
    return x.reshape(x.shape[0], -1, 1, rows)


def product(a: Array, b: Array, of_a: int, of_b: int) -> Float[Array, "x y"]:
    """Contract an axis of a with one of b."""
    return jax.lax.dot_general(
        a, b, (((of_a,), (of_b,)), ((), ())), preferred_element_type=jnp.float32
    )


def masked(logits: Float[Array, "rows s"], bias: Float[Array, "q s"]) -> Float[Array, "rows s"]:
    """Add a query's bias to the logits of all its heads."""
    by_query = logits.reshape(bias.shape[0], -1, bias.shape[1])
    return (by_query + bias[:, None]).reshape(logits.shape)


def as_bias(seen: Bool[Array, "q s"]) -> Float[Array, "q s"]:
    """Return what to add to logits: 0 where something is seen, else -inf."""
    return jnp.where(seen, 0.0, -jnp.inf)


def numbers_of(rows: int, columns: int, axis: int) -> Int[Array, "x y"]:
    """Return the number of each row or column."""
    return jax.lax.broadcasted_iota(jnp.int32, (rows, columns), axis)


def column(row: Float[Array, "1 rows"]) -> Float[Array, "rows 1"]:
    """Turn lanes into rows: registers are transposed whole."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def _row(column: Float[Array, "rows 1"]) -> Float[Array, "1 rows"]:
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]
