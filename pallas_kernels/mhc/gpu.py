"""Hyper-connections on GPU: two kernels, one over columns of the streams, one over their gates.

What a token reads depends on all of its streams, 32 KiB of them at width 4,096, and its logits need
all weights of the gates, 1.6 MB. One program for whole tokens cannot do both well on an H100: with
8 tokens in each of 132 programs the streams would still be in L2 (35 of 50 MB) when they are read
again, but the weights would be read 512 times for 4,096 tokens, 0.8 GB; with 64 tokens it is the
other way round. So `mix` takes 64 tokens and a slice of the columns of all streams, writes to them,
and leaves partial products with the weights, which are read 64 times, 100 MB from L2. `collapse`
adds these up in a fixed order, computes the gates and reads u from the streams.

Of 4,096 tokens of width 4,096, `write_and_read` moves 134 MB of streams and 34 MB of y in, 134 MB
of streams out, then these in again (save what L2 has kept: `collapse` begins with the last tokens)
and 34 MB of u out: 470 MB, and 4 MB of partial products. Few tokens, as in generation, still occupy
as many programs as there are slices.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.blocks import largest_block, pad_axes, power_of_two
from pallas_kernels.mhc.gates import (
    Affine,
    Gating,
    activations,
    inverse_norm,
    matrix_of,
    read_gates,
    write_gates,
)
from pallas_kernels.mhc.index import Blocks
from pallas_kernels.mhc.streams import expand, split, weighted_sum
from pallas_kernels.target import GPU, target_platform


class Tiles(NamedTuple):
    """How the work is cut up."""

    tokens: int  # of a program
    slice: int  # columns of a stream in a program, at most
    piece: int  # columns of a stream at a time, at most
    warps: int


MIX = Tiles(64, 512, 32, 8)
COLLAPSE = Tiles(16, 2048, 128, 4)
SMALLEST = 16  # tensor cores take no smaller tiles
TOKENS = 64  # all arrays are filled up to as many: a multiple of every kernel's tokens
COLUMNS = 64
WEIGHT_PARTS = {"bfloat16": 3, "float32": 1}  # of bfloat16 each where the streams are


def filled(x: Array, tokens: int, columns: int | None = None) -> Array:
    """Fill the axis of tokens, and that of columns, up to whole blocks."""
    return pad_axes(x, {tokens: TOKENS} | ({} if columns is None else {columns: COLUMNS}))


def mixing_weights(fn: Float[Array, "n d r"], dtype) -> Float[Array, "parts n d gates"]:
    """Return parts of the weights that add up to them and multiply streams exactly."""
    fn = pad_axes(fn, {1: COLUMNS, 2: power_of_two(fn.shape[2])})
    return jnp.stack([fn] if dtype == jnp.float32 else split(fn, WEIGHT_PARTS[dtype.name]))


def dot(a: Array, b: Array, **options) -> Array:
    """Multiply matrices of float32 in float32, of bfloat16 exactly."""
    exact = "highest" if a.dtype == jnp.float32 else None
    return plgpu.dot(a, b, precision=exact, **options)


def column(gates: Array) -> Float[Array, "tokens 1"]:
    """Make a vector of tokens a column."""
    return gates[:, None]


def forward(
    x: Float[Array, "tokens n d"],
    written: tuple[Float[Array, "tokens d"], Float[Array, "g tokens"]] | None,
    mixing: tuple[Float[Array, "n d r"], Float[Array, " a"]] | None, gating: Gating,
) -> tuple[Array, ...]:
    """Write to the streams, if there is what to write, and read from them, if there are weights.

    Args:
      written: y and the gates, post then comb row by row.
      mixing: the weights, and the scales and then the offsets of the gates.
    Returns:
      The new streams, u, the next gates and, for the gradient, the products of streams and
      weights and the sum of squares; of these what was asked for.
    """
    tokens, _, d = x.shape
    x = filled(x, 0, 2)
    if written is not None:
        written = filled(written[0], 0, 1), filled(written[1], 1)
    weights = None if mixing is None else mixing_weights(mixing[0], x.dtype)
    results = list(_mix(x, written, weights))
    done = []
    if written is not None:
        x = results.pop(0)
        done.append(x[:tokens, :, :d])
    if mixing is not None:
        u, gates, kept = _collapse(x, *results, mixing[1], gating)
        done += [u[:tokens, :d], gates[:, :tokens], kept[:, :tokens]]
    return tuple(done)


def _mix(x, written, weights) -> list[Array]:
    """Write to the streams; multiply them with the weights, a slice of columns each."""
    tokens, n, width = x.shape
    block = MIX.tokens
    part = largest_block(width, MIX.slice, COLUMNS)
    piece = largest_block(part, MIX.piece, SMALLEST)
    blocks, slices = Blocks(tokens // block), width // part

    def kernel(x, *refs):
        refs = list(refs)
        y, gates = (refs.pop(0), refs.pop(0)) if written else (None, None)
        fn = None if weights is None else refs.pop(0)
        new = refs.pop(0) if written else x
        if written:
            values = [column(gates[i, :]) for i in range(n + n * n)]
            post, comb = values[:n], matrix_of(values[n:], n)

        def step(c, sums):
            at = pl.ds(c * piece, piece)
            parts = [x[:, s, at] for s in range(n)]
            if written:
                parts = [part.astype(jnp.float32) for part in parts]
                parts = expand(parts, y[:, at].astype(jnp.float32), post, comb)
                parts = [part.astype(x.dtype) for part in parts]
                for s, part in enumerate(parts):
                    new[:, s, at] = part
            if fn is None:
                return sums
            mixed, squares = sums
            for s, part in enumerate(parts):
                for i in range(fn.shape[0]):
                    mixed += dot(part, fn[i, s, at, :])
                squares += jnp.sum(jnp.square(part.astype(jnp.float32)), axis=1)
            return mixed, squares

        if fn is None:
            jax.lax.fori_loop(0, part // piece, step, 0)
            return
        mixed, squares = refs
        zeros = jnp.zeros((block, fn.shape[3]), jnp.float32), jnp.zeros(block, jnp.float32)
        sums = jax.lax.fori_loop(0, part // piece, step, zeros)
        mixed[...], squares[0, :] = sums[0].T, sums[1]

    streams = pl.BlockSpec((block, n, part), blocks.streams)
    operands, specs, outputs = [x], [streams], []
    if written:
        operands += written
        specs.append(pl.BlockSpec((block, part), blocks.rows))
        specs.append(pl.BlockSpec((n + n * n, block), blocks.gates))
        outputs.append((x.shape, x.dtype, streams))
    if weights is not None:
        gates = weights.shape[3]
        operands.append(weights)
        specs.append(pl.BlockSpec((weights.shape[0], n, part, gates), blocks.weights))
        for rows in (gates, 1):
            spec = pl.BlockSpec((None, rows, block), blocks.partial)
            outputs.append(((slices, rows, tokens), jnp.float32, spec))
    return launch(
        kernel, (blocks.tokens, slices), operands, specs, outputs, MIX.warps,
        f"streams_{'write' * (written is not None)}{'mix' * (weights is not None)}",
    )


def launch(kernel, grid, operands, specs, outputs, warps: int, name: str, stages: int = 2):
    """Call a kernel and return its results, a list.

    Args:
      outputs: shape, dtype and block of each.
      stages: steps of loops whose loads are under way.
    """
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=specs,
        out_specs=[spec for *_, spec in outputs],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=target_platform() != GPU,
        name=name,
    )(*operands)


def total(ref, row: int) -> Float[Array, " tokens"]:
    """Add up the slices' sums of a row, in their order."""
    first = ref[0, row, :]
    return jax.lax.fori_loop(1, ref.shape[0], lambda i, sums: sums + ref[i, row, :], first)


def whole(array: Array) -> pl.BlockSpec:
    """Return the block that is all of an array."""
    return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)


def _collapse(x, mixed, squares, affine, gating: Gating) -> list[Array]:
    """Compute the gates and read from the streams."""
    tokens, n, width = x.shape
    block = COLLAPSE.tokens
    part = largest_block(width, COLLAPSE.slice, COLUMNS)
    piece = largest_block(part, COLLAPSE.piece, SMALLEST)
    blocks = Blocks(tokens // block)

    def kernel(x, mixed, squares, affine, u, gates, kept):
        affine = Affine(affine)
        raw = [total(mixed, i) for i in range(n)]
        summed = total(squares, 0)
        inverse = inverse_norm(summed, gating)
        pre = read_gates(activations(raw, inverse, affine, gating), gating)
        pre = [column(gate) for gate in pre]

        def read(c, _):
            at = pl.ds(c * piece, piece)
            parts = [x[:, s, at].astype(jnp.float32) for s in range(n)]
            u[:, at] = weighted_sum(pre, parts).astype(u.dtype)
            return 0

        jax.lax.fori_loop(0, part // piece, read, 0)

        @pl.when(pl.program_id(1) == 0)
        def _():
            products = raw + [total(mixed, i) for i in range(n, gating.logits)]
            for i, row in enumerate([*products, summed]):
                kept[i, :] = row
            values = activations(products, inverse, affine, gating)
            for i, row in enumerate(write_gates(values, gating)):
                gates[i, :] = row

    last_first = blocks.reversed
    outputs = [
        ((tokens, width), x.dtype, pl.BlockSpec((block, part), last_first(blocks.rows))),
        *(
            ((rows, tokens), jnp.float32,
             pl.BlockSpec((rows, block), last_first(blocks.gates)))
            for rows in (gating.written, gating.logits + 1)
        ),
    ]  # fmt: skip
    specs = [
        pl.BlockSpec((block, n, part), last_first(blocks.streams)),
        *(
            pl.BlockSpec((*sums.shape[:2], block), last_first(blocks.all_partial))
            for sums in (mixed, squares)
        ),
        whole(affine),
    ]
    return launch(
        kernel, (blocks.tokens, width // part), [x, mixed, squares, affine], specs, outputs,
        COLLAPSE.warps, "streams_collapse",
    )
