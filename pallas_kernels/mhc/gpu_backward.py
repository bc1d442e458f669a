"""The gradients of hyper-connections on GPU, in three kernels.

`_read_gradient` goes over slices of columns for the gradient of what is read, `_gate_gradient` over
the gates of tokens, and `_stream_gradient` over narrow slices again, each for many tokens in turn,
so that a slice of the weights' gradient stays in registers until it is written once. What several
programs add to is left as partial sums, which XLA adds up in a fixed order.

The new streams are computed again, twice: they are not among what is kept. Of 4,096 tokens of width
4,096, `write_and_read` moves 201 MB for the first kernel (streams, y, the gradient of u) and, for
the last, 134 MB of streams, 134 MB of gradients of the new ones and 67 MB of y and the gradient of
u in, 134 MB and 34 MB out: 705 MB, and 29 MB of partial sums.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.blocks import largest_block, pad_axes, power_of_two
from pallas_kernels.index_math import cdiv
from pallas_kernels.mhc.gates import Affine, Gating, gate_gradients, matrix_of
from pallas_kernels.mhc.gpu import (
    COLUMNS,
    SMALLEST,
    Tiles,
    column,
    dot,
    filled,
    launch,
    total,
    whole,
)
from pallas_kernels.mhc.index import Blocks, Groups
from pallas_kernels.mhc.streams import expand, expand_gradient, for_product, split

READ = Tiles(32, 512, 64, 8)
# Of the gates' kernel: a token for each thread, which reads back what itself wrote down. Nothing is
# loaded ahead of its turn, by other threads perhaps: one stage.
GATE_WARPS, GATE_STAGES = 2, 1
GATE_TOKENS = 32 * GATE_WARPS
PARTS = 3  # of a float32, which multiply streams in bfloat16 exactly
# Pairs of parts whose products make up that of two float32: without what is below 2^-16 of it. Its
# sum with the streams' gradient is rounded to bfloat16.
PAIRS = ((0, 0), (0, 1), (1, 0))


class StreamTiles(NamedTuple):
    """How the work of `_stream_gradient` is cut up."""

    tokens: int  # at a time
    columns: int  # of a stream in a program
    fewest: int  # tiles of tokens that a program takes one after the other, at least
    groups: int  # of tokens, at most: there are as many partial sums of the weights' gradient
    warps: int


STREAM = StreamTiles(16, 64, 64, 16, 8)


def tiles_of_group(tiles: int) -> int:
    """Return how many tiles of tokens make a group."""
    count = STREAM.fewest
    while cdiv(tiles, count) > STREAM.groups:
        count *= 2
    return count


def backward(
    x: Float[Array, "tokens n d"],
    written: tuple[Float[Array, "tokens d"], Float[Array, "g tokens"]] | None,
    mixing: tuple[Float[Array, "n d r"], Float[Array, " a"]] | None,
    kept: Float[Array, "k tokens"] | None, grads: tuple[Array, ...], gating: Gating,
) -> tuple[Array, ...]:
    """Return the gradients of `forward`.

    Args:
      kept: the last result of `forward`, if there were weights.
      grads: in the other results.
    Returns:
      Gradients in x, in y and its gates, in the weights and in what the gates' sigmoids and softmax
      took; of these what was given.
    """
    tokens, n, d = x.shape
    x, grads = filled(x, 0, 2), list(grads)
    if written is not None:
        written = filled(written[0], 0, 1), filled(written[1], 1)
    new_grad = None if written is None else filled(grads.pop(0), 0, 2)
    reading = None
    if mixing is not None:
        fn, affine = mixing
        u_grad, gates_grad = filled(grads[0], 0, 1), filled(grads[1], 1)
        (pre_sums,) = _read_gradient(x, written, u_grad)
        values, raw, factors, _ = _gate_gradient(
            filled(kept, 1), affine, pre_sums, gates_grad, gating
        )
        fn = pad_axes(fn, {1: COLUMNS, 2: power_of_two(gating.logits)})
        reading = u_grad, raw, factors, _parts(fn, 2, x.dtype)
    results = list(_stream_gradient(x, written, new_grad, reading))
    done = [results.pop(0)[:tokens, :, :d]]
    if written is not None:
        done.append(results.pop(0)[:tokens, :d])
        done.append(jnp.sum(results.pop(0), axis=0)[:, :tokens])
    if mixing is not None:
        done += [jnp.sum(results[0], axis=0)[:, :d, : gating.logits], values[:, :tokens]]
    return tuple(done)


def _parts(x: Array, count: int, dtype) -> Array:
    return jnp.stack([x] if dtype == jnp.float32 else split(x, count))


def _new_streams(x, y, gates, rows, at) -> list[Array]:
    """Return some columns of the streams of some tokens: as they are, or written to."""
    n = x.shape[1]
    parts = [x[rows, s, at].astype(jnp.float32) for s in range(n)]
    if y is None:
        return parts
    values = [column(gates[i, rows]) for i in range(n + n * n)]
    written = y[rows, at].astype(jnp.float32)
    parts = expand(parts, written, values[:n], matrix_of(values[n:], n))
    return [part.astype(x.dtype).astype(jnp.float32) for part in parts]


def _read_gradient(x, written, u_grad) -> list[Array]:
    """Compute the gradient in pre, a slice of columns each."""
    tokens, n, width = x.shape
    block = READ.tokens
    part = largest_block(width, READ.slice, COLUMNS)
    piece = largest_block(part, READ.piece, SMALLEST)
    blocks, slices = Blocks(tokens // block), width // part

    def kernel(x, *refs):
        *read, u_grad, sums = refs
        y, gates = read or (None, None)

        def step(c, totals):
            at = pl.ds(c * piece, piece)
            grad = u_grad[:, at].astype(jnp.float32)
            parts = _new_streams(x, y, gates, pl.ds(0, block), at)
            products = [jnp.sum(part * grad, axis=1) for part in parts]
            return tuple(a + b for a, b in zip(totals, products, strict=True))

        zero = jnp.zeros(block, jnp.float32)
        totals = jax.lax.fori_loop(0, part // piece, step, (zero,) * n)
        for s, row in enumerate(totals):
            sums[s, :] = row

    rows = pl.BlockSpec((block, part), blocks.rows)
    specs = [pl.BlockSpec((block, n, part), blocks.streams)]
    if written is not None:
        specs += [rows, pl.BlockSpec((n + n * n, block), blocks.gates)]
    sums = pl.BlockSpec((None, n, block), blocks.partial)
    return launch(
        kernel, (blocks.tokens, slices), [x, *(written or ()), u_grad], [*specs, rows],
        [((slices, n, tokens), jnp.float32, sums)], READ.warps, "streams_read_gradient",
    )


def _gate_gradient(kept, affine, pre_sums, gates_grad, gating: Gating) -> list[Array]:
    """Compute what the gradients of the streams need of the gates.

    Returns:
      The gradient in what the sigmoids and the softmax took; that in the products of streams and
      weights, with rows of zeros; pre and the factor of the streams' norm; and what the kernel
      wrote down for itself.
    """
    tokens, n = kept.shape[1], gating.streams
    blocks, padded = Blocks(tokens // GATE_TOKENS), power_of_two(gating.logits)

    def kernel(kept, affine, pre_sums, gates_grad, values, raw, factors, rounds):
        found = gate_gradients(
            [kept[i, :] for i in range(gating.logits)], kept[gating.logits, :], Affine(affine),
            [total(pre_sums, i) for i in range(n)],
            [gates_grad[i, :] for i in range(gating.written)], gating, rounds,
        )
        zero = jnp.zeros(GATE_TOKENS, jnp.float32)
        for i in range(padded):
            raw[i, :] = found.raw[i] if i < gating.logits else zero
        for i, row in enumerate(found.activations):
            values[i, :] = row
        for i, row in enumerate([*found.pre, found.norm]):
            factors[i, :] = row

    def spec(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((rows, GATE_TOKENS), blocks.gates)

    rows = gating.logits, padded, n + 1, gating.sums
    return launch(
        kernel, (blocks.tokens,), [kept, affine, pre_sums, gates_grad],
        [
            spec(kept.shape[0]), whole(affine),
            pl.BlockSpec((*pre_sums.shape[:2], GATE_TOKENS), blocks.all_partial),
            spec(gating.written),
        ],
        [((count, tokens), jnp.float32, spec(count)) for count in rows],
        GATE_WARPS, "streams_gate_gradient", GATE_STAGES,
    )  # fmt: skip


def _stream_gradient(x, written, new_grad, reading) -> list[Array]:
    """Compute the gradients of the streams, of y and, in parts, of its gates and the weights."""
    tokens, n, width = x.shape
    block, wide = STREAM.tokens, STREAM.columns
    tiles = tokens // block
    groups, slices = Groups(tiles, tiles_of_group(tiles)), width // wide
    writes, reads = written is not None, reading is not None

    def kernel(x, *refs):
        refs = list(refs)
        y, gates, new_grad = (refs.pop(0) for _ in range(3)) if writes else (None,) * 3
        u_grad, raw, factors, fn = (refs.pop(0) for _ in range(4)) if reads else (None,) * 4
        x_grad = refs.pop(0)
        y_grad, gate_sums = (refs.pop(0), refs.pop(0)) if writes else (None, None)
        group, at = pl.program_id(1), pl.ds(0, wide)

        def step(k, weight_sums):
            rows = pl.ds((groups.first(group) + k) * block, block)
            grads = [0] * n
            if writes:
                grads = [new_grad[rows, m, at].astype(jnp.float32) for m in range(n)]
            if reads:
                new = _new_streams(x, y, gates, rows, at)
                through, weight_sums = _through_gates(new, raw[:, rows], fn, weight_sums, x.dtype)
                pre = [column(factors[m, rows]) for m in range(n + 1)]
                grad = u_grad[rows, at].astype(jnp.float32)
                for m in range(n):
                    grads[m] += through[m] + pre[m] * grad + pre[n] * new[m]
            if writes:
                xs = [x[rows, s, at].astype(jnp.float32) for s in range(n)]
                written = y[rows, at].astype(jnp.float32)
                for m, grad in enumerate(grads):
                    gate_sums[m, rows] = jnp.sum(grad * written, axis=1)
                    for i, part in enumerate(xs):
                        gate_sums[n + i * n + m, rows] = jnp.sum(grad * part, axis=1)
                values = [column(gates[i, rows]) for i in range(n + n * n)]
                grads, in_y = expand_gradient(grads, values[:n], matrix_of(values[n:], n))
                y_grad[rows, at] = in_y.astype(y_grad.dtype)
            for s, grad in enumerate(grads):
                x_grad[rows, s, at] = grad.astype(x_grad.dtype)
            return weight_sums

        zeros = (jnp.zeros((wide, fn.shape[3]), jnp.float32),) * n if reads else ()
        sums = jax.lax.fori_loop(0, groups.length(group), step, zeros)
        for s, weight_sum in enumerate(sums):
            refs[0][s] = weight_sum

    streams = pl.BlockSpec((tokens, n, wide), groups.streams)
    rows = pl.BlockSpec((tokens, wide), groups.rows)
    operands, specs, outputs = [x], [streams], [(x.shape, x.dtype, streams)]
    if writes:
        y, gates = written
        operands += [y, gates, new_grad]
        specs += [rows, pl.BlockSpec(gates.shape, groups.gates), streams]
        outputs.append((y.shape, y.dtype, rows))
        sums = pl.BlockSpec((None, *gates.shape), groups.partial)
        outputs.append(((slices, *gates.shape), jnp.float32, sums))
    if reads:
        operands += reading
        _, raw, factors, fn = reading
        specs += [rows, *(pl.BlockSpec(a.shape, groups.gates) for a in (raw, factors))]
        specs.append(pl.BlockSpec((fn.shape[0], n, wide, fn.shape[3]), groups.weights))
        sums = pl.BlockSpec((None, n, wide, fn.shape[3]), groups.weight_sums)
        outputs.append(((groups.count, *fn.shape[1:]), jnp.float32, sums))
    name = f"streams_{'write' * writes}{'read' * reads}_stream_gradient"
    return launch(
        kernel, (slices, groups.count), operands, specs, outputs, STREAM.warps, name
    )


def _through_gates(new, raw, fn, weight_sums, dtype) -> tuple[list[Array], tuple[Array, ...]]:
    """Multiply the gradients in gates with the weights and with the streams.

    Args:
      new: columns of the streams, values that dtype holds.
      raw: gradients in the products of streams and weights [gates, tokens].
    Returns:
      The gradients in the streams, and the weights' gradient with what is added to it.
    """
    exact = dtype == jnp.float32
    parts = [for_product(part) for part in ([raw] if exact else split(raw, PARTS))]
    pairs = ((0, 0),) if exact else PAIRS
    through, sums = [], []
    for s, (x, weight_sum) in enumerate(zip(new, weight_sums, strict=True)):
        weights = [for_product(fn[i, s]) for i in range(fn.shape[0])]
        through.append(sum(
            dot(parts[a], weights[b], trans_a=True, trans_b=True) for a, b in pairs
        ))
        x = for_product(x.astype(dtype))
        sums.append(weight_sum + sum(dot(x, part, trans_a=True, trans_b=True) for part in parts))
    return through, tuple(sums)
