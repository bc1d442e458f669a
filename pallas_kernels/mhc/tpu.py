"""Hyper-connections on TPU: a step takes a block of tokens, with all of their streams, in VMEM.

Streams come from HBM once. The block is gone through twice, in pieces of columns: to write to the
streams and to multiply them with the gates' weights, and, once the gates are known, to read u. The
weights stay in VMEM. For 4,096 tokens of width 4,096, `write_and_read` moves 134 MB of streams and
34 MB of y in, and 134 MB of streams and 34 MB of u out.

In a piece tokens lie on sublanes, in a gate's vector on lanes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.blocks import largest_block, pad_axes
from pallas_kernels.cost import estimate
from pallas_kernels.index_math import cdiv
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
from pallas_kernels.target import TPU, target_platform

LANES, SUBLANES = 128, 8
MOST_TOKENS, FEWEST_TOKENS = 128, 16  # of a block
BLOCK_BYTES = 2**22  # of a block's streams, at most
PIECE = 256  # columns of a piece, at most
ROWS = 16  # tokens of a piece that are worked on at a time: what registers hold
VMEM_BYTES = 48 * 2**20
WEIGHT_PARTS = {"bfloat16": 3, "float32": 1}  # of bfloat16 each where the streams are
PRODUCT = (((1,), (0,)), ((), ()))  # of matrices: the axes that `dot_general` sums over


def block_of(tokens: int, row_bytes: int) -> int:
    """Return how many tokens a block has."""
    block = MOST_TOKENS
    while block > FEWEST_TOKENS and (block * row_bytes > BLOCK_BYTES or block >= 2 * tokens):
        block //= 2
    return block


def rounded(rows: int) -> int:
    """Return a number of gates rounded up to whole registers."""
    return cdiv(rows, SUBLANES) * SUBLANES


def by_blocks(gates: Float[Array, "g tokens"], block: int) -> Float[Array, "blocks g block"]:
    """Put each block's part of the gates on axes of its own, gates rounded up."""
    gates = pad_axes(gates, {0: SUBLANES})
    return gates.reshape(gates.shape[0], -1, block).swapaxes(0, 1)


def from_blocks(gates: Float[Array, "blocks g block"]) -> Float[Array, "g tokens"]:
    """Undo `by_blocks`."""
    return gates.swapaxes(0, 1).reshape(gates.shape[1], -1)


def spread(wide, gates: Float[Array, "g tokens"], count: int) -> None:
    """Write each gate to whole registers, a token's to all lanes: done once for all pieces."""
    turned = gates.T
    for i in range(count):
        wide[i] = jnp.broadcast_to(turned[:, i : i + 1], wide.shape[1:])


def vectors(ref, count: int) -> list[Array]:
    """Return the first rows of a block of gates."""
    return [ref[pl.ds(i, 1), :] for i in range(count)]


def put(ref, rows: list[Array], first: int = 0) -> None:
    """Write rows of gates."""
    for i, row in enumerate(rows):
        ref[pl.ds(first + i, 1), :] = row


class Pieces:
    """A block's pieces: the same columns of every stream, and some rows of these at a time."""

    def __init__(self, streams: int, width: int, block: int):
        self.streams, self.width = streams, width
        self.size = largest_block(width, PIECE, LANES)
        self.count = width // self.size
        self.rows = [pl.ds(i, ROWS) for i in range(0, block, ROWS)]

    def of(self, c, stream: int = 0):
        """Return the columns of a stream in a piece."""
        return pl.ds(pl.multiple_of(stream * self.width + c * self.size, LANES), self.size)

    def load(self, ref, rows, c) -> list[Array]:
        """Return a piece of each stream in float32."""
        return [ref[rows, self.of(c, s)].astype(jnp.float32) for s in range(self.streams)]

    def store(self, ref, rows, c, xs: list[Array]) -> None:
        """Write a piece of each stream."""
        for s, x in enumerate(xs):
            ref[rows, self.of(c, s)] = x.astype(ref.dtype)

    def gates(self, wide, rows, count: int) -> list[Array]:
        """Return gates that were `spread`, as wide as a piece."""
        return [jnp.concatenate([wide[i, rows]] * (self.size // LANES), 1) for i in range(count)]


def folded(x: Float[Array, "tokens columns"]) -> Float[Array, "tokens lanes"]:
    """Add up groups of lanes."""
    return sum(x[:, i : i + LANES] for i in range(0, x.shape[1], LANES))


def mixing_weights(fn: Float[Array, "n d r"], dtype) -> Float[Array, "columns lanes"]:
    """Lay the weights out for a product with streams: their parts side by side."""
    n, d, r = fn.shape
    fn = pad_axes(fn.reshape(n * d, r), {1: SUBLANES})
    parts = [fn] if dtype == jnp.float32 else split(fn, WEIGHT_PARTS[dtype.name])
    return pad_axes(jnp.concatenate(parts, axis=1), {1: LANES})


def products(pieces: Pieces, ref, fn, c) -> Float[Array, "tokens lanes"]:
    """Multiply a piece of the streams with its weights."""
    exact = jax.lax.Precision.HIGHEST if ref.dtype == jnp.float32 else None
    return sum(
        jax.lax.dot_general(
            ref[:, pieces.of(c, s)], fn[pieces.of(c, s), :], PRODUCT,
            precision=exact, preferred_element_type=jnp.float32,
        )
        for s in range(pieces.streams)
    )


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
    tokens, n, d = x.shape
    plan = Plan(x, gating)
    operands, specs = [plan.streams(x)], [plan.streams_spec]
    outputs = []
    if written is not None:
        y, gates = written
        gates = plan.gates(gates)
        operands += [plan.rows(y), gates]
        specs += [plan.rows_spec, plan.gates_spec(gates.shape[1])]
        outputs.append((operands[0].shape, x.dtype, plan.streams_spec))
    if mixing is not None:
        fn, affine = mixing
        fn = mixing_weights(pad_axes(fn, {1: LANES}), x.dtype)
        operands += [fn, affine]
        specs += [plan.resident(fn.shape), pl.BlockSpec(memory_space=pltpu.SMEM)]
        outputs.append(((plan.tokens, plan.width), x.dtype, plan.rows_spec))
        for rows in (gating.written, gating.logits + 1):
            shape = (plan.blocks.tokens, rounded(rows), plan.block)
            outputs.append((shape, jnp.float32, plan.gates_spec(shape[1])))
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs]
    flops = 2 * x.size * gating.logits * (mixing is not None)
    results = list(pl.pallas_call(
        _forward_kernel(plan, written is not None, mixing is not None),
        grid=(plan.blocks.tokens,),
        in_specs=specs,
        out_specs=[spec for *_, spec in outputs],
        out_shape=shapes,
        scratch_shapes=[
            *[pltpu.VMEM((plan.block, LANES), jnp.float32)] * (mixing is not None),
            pltpu.VMEM((gating.written, plan.block, LANES), jnp.float32),
            pltpu.VMEM((rounded(n), plan.block), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=estimate(flops, operands, shapes),
        interpret=target_platform() != TPU,
        name=f"streams_{'write' * (written is not None)}{'read' * (mixing is not None)}",
    )(*operands))
    done = []
    if written is not None:
        done.append(results.pop(0).reshape(plan.tokens, n, -1)[:tokens, :, :d])
    if mixing is not None:
        u, gates, kept = results
        done += [u[:tokens, :d], from_blocks(gates)[: gating.written, :tokens]]
        done.append(from_blocks(kept)[: gating.logits + 1, :tokens])
    return tuple(done)


class Plan:
    """How arrays of one size are cut up."""

    def __init__(self, x: Float[Array, "tokens n d"], gating: Gating):
        tokens, n, d = x.shape
        self.gating = gating
        self.width = cdiv(d, LANES) * LANES
        self.block = block_of(tokens, n * self.width * x.dtype.itemsize)
        self.pieces = Pieces(n, self.width, self.block)
        self.blocks = Blocks(cdiv(tokens, self.block))
        self.tokens = self.blocks.tokens * self.block
        self.streams_spec = pl.BlockSpec((self.block, n * self.width), self.blocks.rows)
        self.rows_spec = pl.BlockSpec((self.block, self.width), self.blocks.rows)

    def streams(self, x: Float[Array, "tokens n d"]) -> Float[Array, "tokens columns"]:
        x = pad_axes(x, {0: self.block, 2: LANES})
        return x.reshape(x.shape[0], -1)

    def rows(self, y: Float[Array, "tokens d"]) -> Float[Array, "tokens d"]:
        return pad_axes(y, {0: self.block, 1: LANES})

    def gates(self, gates: Float[Array, "g tokens"]) -> Float[Array, "blocks g block"]:
        return by_blocks(pad_axes(gates, {1: self.block}), self.block)

    def gates_spec(self, rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, rows, self.block), self.blocks.own_gates)

    def resident(self, shape: tuple[int, ...]) -> pl.BlockSpec:
        """Return a whole array that stays in VMEM, once."""
        return pl.BlockSpec(shape, lambda *_: (0,) * len(shape), pipeline_mode=pl.Buffered(1))


def _forward_kernel(plan: Plan, writes: bool, reads: bool):
    pieces, gating, block = plan.pieces, plan.gating, plan.block
    n = gating.streams

    def kernel(x, *refs):
        refs = list(refs)
        y, gates = (refs.pop(0), refs.pop(0)) if writes else (None, None)
        fn, affine = (refs.pop(0), Affine(refs.pop(0))) if reads else (None, None)
        new = refs.pop(0) if writes else x
        wide, turn = refs[-2:]
        if writes:
            spread(wide, gates[...], gating.written)

        def write_and_mix(c, mixed):
            for rows in pieces.rows:
                if writes:
                    values = pieces.gates(wide, rows, gating.written)
                    written = y[rows, pieces.of(c)].astype(jnp.float32)
                    parts = expand(
                        pieces.load(x, rows, c), written, values[:n], matrix_of(values[n:], n)
                    )
                    pieces.store(new, rows, c, parts)
                if reads:
                    parts = pieces.load(new, rows, c)
                    squares[rows] += folded(sum(part * part for part in parts))
            return mixed + products(pieces, new, fn, c) if reads else mixed

        if not reads:
            jax.lax.fori_loop(0, pieces.count, write_and_mix, 0)
            return
        u, next_gates, kept, squares = refs[:-2]
        squares[...] = jnp.zeros_like(squares)
        zeros = jnp.zeros((block, LANES), jnp.float32)
        mixed = jax.lax.fori_loop(0, pieces.count, write_and_mix, zeros)
        put_kept(kept, mixed, squares[...], gating)
        values = activations(
            vectors(kept, gating.logits), inverse_norm(kept[pl.ds(gating.logits, 1), :], gating),
            affine, gating,
        )
        put(next_gates, write_gates(values, gating))
        turn[...] = jnp.zeros_like(turn)
        put(turn, read_gates(values, gating))
        spread(wide, turn[...], n)

        def read(c, _):
            for rows in pieces.rows:
                pre = pieces.gates(wide, rows, n)
                total = weighted_sum(pre, pieces.load(new, rows, c))
                u[rows, pieces.of(c)] = total.astype(u.dtype)
            return 0

        jax.lax.fori_loop(0, pieces.count, read, 0)

    return kernel


def put_kept(kept, mixed: Array, squares: Array, gating: Gating) -> None:
    """Write the products of streams and weights, their parts added up, and the sum of squares."""
    kept[...] = jnp.zeros_like(kept)
    mixed, rows = mixed.T, rounded(gating.logits)
    parts = [mixed[i : i + rows] for i in range(0, LANES - rows + 1, rows)]
    total = sum(parts[1:], parts[0])
    kept[pl.ds(0, gating.logits), :] = total[: gating.logits]
    kept[pl.ds(gating.logits, 1), :] = jnp.sum(squares.T, axis=0, keepdims=True)
