"""Routed experts on GPU: products of blocks of rows with their expert's weights.

Rows of tokens are loaded through a plan's indices, never copied to rows of experts. The tiles of
one block are computed at the same time as those of the next: an expert's weights and the rows of a
block are then read once, and shared in the second-level cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.blocks import largest_block
from pallas_kernels.codes import BYTES, powers
from pallas_kernels.moe.formats import Fp4, decode
from pallas_kernels.moe.index import Grouped, Packed
from pallas_kernels.moe.plan import Plan
from pallas_kernels.moe.swiglu import clamped_swiglu, rounded, swiglu_gradients
from pallas_kernels.target import GPU, target_platform

UNIT = 16  # tensor cores take no smaller tiles


class Tiles(NamedTuple):
    """How the work is cut up."""

    width: int  # columns of a tile of the product, at most
    depth: int  # of the columns or rows summed over in one step, at most
    warps: int
    stages: int  # steps whose loads are under way


# By the products that a tile sums at a time.
TILES = {"bfloat16": {1: Tiles(128, 64, 8, 4), 2: Tiles(128, 64, 8, 3)},
         "float32": {1: Tiles(128, 32, 8, 3), 2: Tiles(64, 32, 8, 3)}}  # fmt: skip


class _Block(NamedTuple):
    """What a program knows of its block: its rows, their tokens, its expert and its columns."""

    rows: pl.Slice
    columns: pl.Slice | None  # of the product
    expert: Array | None
    tokens: Array | None
    found: Array | None

    def load(self, ref, part: pl.Slice) -> Array:
        """Load columns of the rows, through their tokens where they have some."""
        if self.tokens is None:
            return ref[self.rows, part]
        columns = part.start + jnp.arange(part.size, dtype=jnp.int32)
        at = ref.at[self.tokens[:, None], columns[None, :]]
        mask = jnp.broadcast_to(self.found[:, None], (self.rows.size, part.size))
        return plgpu.load(at, mask=mask, other=0.0)


def hidden(
    x: Float[Array, "t d"], plan: Plan, share: Float[Array, "rows 1"],
    gate: Float[Array, "e d f"] | Fp4, up: Float[Array, "e d f"] | Fp4, *, limit: float,
    keep: bool,
) -> list[Float[Array, "rows f"]]:
    """Return the weighted hidden layer of each row; to keep also both products it is made of."""

    def finish(block, sums, refs):
        share, outs = refs[0], refs[1:]
        value = clamped_swiglu(*sums, limit) * share[block.rows, :]
        outs[0][block.rows, block.columns] = value.astype(x.dtype)
        for out, result in zip(outs[1:], sums, strict=False):
            out[block.rows, block.columns] = rounded(result, limit, x.dtype)

    return _by_block(
        "expert_hidden", finish, plan, (x,), (gate, up), (share,), gathered=True,
        turned=isinstance(gate, Fp4),
        outs=[x.dtype] * (3 if keep else 1),
    )


def output(
    hidden: Float[Array, "rows f"], plan: Plan, down: Float[Array, "e f d"] | Fp4
) -> Float[Array, "rows d"]:
    """Return each row's output."""
    (rows,) = _by_block(
        "expert_output", _store_sum, plan, (hidden,), (down,), (), turned=isinstance(down, Fp4)
    )
    return rows


def hidden_gradients(
    grad: Float[Array, "t d"], plan: Plan, share: Float[Array, "rows 1"],
    gate: Float[Array, "rows f"], up: Float[Array, "rows f"], down: Float[Array, "e f d"], *,
    limit: float,
) -> list[Array]:
    """Return the hidden layer, the gradients of both its products and that of each row's weight.

    The product alone is a kernel. What follows needs four more tiles beside its sum, for which a
    program has no registers; XLA makes one pass of it, which moves 4 f bytes a row more in
    bfloat16.
    """
    (of_hidden,) = _by_block(
        "expert_hidden_gradients", _store_sum, plan, (grad,), (down,), (), gathered=True,
        turned=True,
    )
    of_hidden, gates, ups = (a.astype(jnp.float32) for a in (of_hidden, gate, up))
    plain = clamped_swiglu(gates, ups, limit)
    grads = swiglu_gradients(gates, ups, of_hidden * share, limit)
    value, *grads = (a.astype(grad.dtype) for a in (plain * share, *grads))
    return [value, *grads, jnp.sum(of_hidden * plain, axis=1)]


def row_gradients(
    grad_gate: Float[Array, "rows f"], grad_up: Float[Array, "rows f"], plan: Plan,
    gate: Float[Array, "e d f"], up: Float[Array, "e d f"],
) -> Float[Array, "rows d"]:
    """Return the gradient of each row's token."""
    (rows,) = _by_block(
        "expert_row_gradients", _store_sum, plan, (grad_gate, grad_up), (gate, up), (), turned=True
    )
    return rows


def _store_sum(block: _Block, sums, refs) -> None:
    refs[0][block.rows, block.columns] = sums[0].astype(refs[0].dtype)


def _by_block(
    name: str, finish: Callable, plan: Plan, lefts: tuple[Array, ...], weights: tuple[Array, ...],
    others: tuple[Array, ...], *, turned: bool, gathered: bool = False, outs=None,
) -> list[Array]:
    """Multiply each block's rows with its expert's weights, one program for each tile of a block.

    Several left factors are summed, one with several weights is multiplied with each.

    Args:
      finish: stores the products, given the block, and the refs of `others` and the results.
      turned: sum over the weights' last axis.
      gathered: the left factors are tokens' rows.
      outs: dtypes of results; None: one, that of the left factors.
    """
    size = plan.source.size // plan.owner.size
    grouped, tiles = Grouped(size), TILES[lefts[0].dtype.name][len(weights)]
    packed = isinstance(weights[0], Fp4)
    inner, columns = _sizes(weights[0], turned)
    width = largest_block(columns, tiles.width, UNIT)
    depth, across = largest_block(inner, tiles.depth, UNIT), columns // width

    def kernel(owner, used, token, *refs):
        ins, refs = refs[: len(lefts)], refs[len(lefts) :]
        matrices, rest = _grouped_refs(refs, weights)
        number, tile = grouped.program(pl.program_id(0), across)

        @pl.when(number < used[0])
        def _():
            rows = pl.ds(grouped.row(number), size)
            known = grouped.token(token[rows], lefts[0].shape[0]) if gathered else (None, None)
            block = _Block(rows, pl.ds(tile * width, width), owner[number], *known)

            def step(k, totals):
                part = pl.ds(k * depth, depth)
                if packed:
                    return _add_packed(block, ins[0], matrices, part, inner, totals)
                at = (block.columns, part) if turned else (part, block.columns)
                rights = [ref[block.expert, at[0], at[1]] for (ref,) in matrices]
                return _add_products([block.load(ref, part) for ref in ins], rights, totals, turned)

            zeros = jnp.zeros((size, width), jnp.float32)
            totals = (zeros,) * (len(weights) // len(lefts))
            totals = jax.lax.fori_loop(0, inner // depth, step, totals)
            finish(block, totals, rest)

    rows = plan.source.size
    shapes = [(rows, columns, dtype) for dtype in outs or [lefts[0].dtype]]
    return _call(
        name, kernel, plan.owner.size * across, tiles, shapes,
        (plan.owner, plan.used, plan.token, *lefts, *jax.tree.leaves(weights), *others),
    )


def _sizes(weights: Array | Fp4, turned: bool) -> tuple[int, int]:
    """Return the length summed over, in bytes of codes if there are such, and the other."""
    shape = weights.codes.shape if isinstance(weights, Fp4) else weights.shape
    return shape[:0:-1] if turned else shape[1:]


def _grouped_refs(refs, weights):
    """Return the refs of each of the weights, and those behind them."""
    each = len(jax.tree.leaves(weights[0]))
    count = each * len(weights)
    return [refs[k : k + each] for k in range(0, count, each)], refs[count:]


def _add_packed(block: _Block, left, matrices, part: pl.Slice, inner: int, totals):
    """Add the products with even columns and those with odd ones, which lie behind them."""
    row = Packed(inner, BYTES)
    even, odd = block.load(left, part), block.load(left, pl.ds(row.odd(part.start), part.size))
    group = row.scale(part.start + jnp.arange(part.size, dtype=jnp.int32))
    out = block.columns.start + jnp.arange(block.columns.size, dtype=jnp.int32)
    added = []
    for total, (codes, scales) in zip(totals, matrices, strict=True):
        scale = powers(plgpu.load(scales.at[block.expert, out[:, None], group[None, :]]))
        low, high = decode(codes[block.expert, block.columns, part], scale, even.dtype)
        total += plgpu.dot(even, low, trans_b=True)
        added.append(total + plgpu.dot(odd, high, trans_b=True))
    return tuple(added)


def _add_products(lefts, rights, totals, turned: bool):
    """Add each product to its sum, or all to the one that there is."""
    dot = functools.partial(plgpu.dot, trans_b=turned)
    if len(lefts) == len(rights) > 1:
        total = totals[0]
        for left, right in zip(lefts, rights, strict=True):
            total += dot(left, right)
        return (total,)
    return tuple(
        total + dot(lefts[0], right) for total, right in zip(totals, rights, strict=True)
    )


def weight_gradients(
    left: Float[Array, "n i"], rights: tuple[Float[Array, "m j"], ...], plan: Plan, *,
    gathered: str, dtype,
) -> list[Float[Array, "e i j"]]:
    """Return left^T right over the rows of each expert: one program for each tile of its weights.

    Args:
      gathered: "left" or "right", the factor whose rows are tokens'; the other's are experts'.
    """
    size, experts = plan.source.size // plan.owner.size, plan.first.size - 1
    grouped, tiles = Grouped(size), TILES[left.dtype.name][len(rights)]
    inner, outer = left.shape[1], rights[0].shape[1]
    height, width = (largest_block(length, tiles.width, UNIT) for length in (inner, outer))
    depth, down, across = min(tiles.depth, size), inner // height, outer // width
    tokens = (left if gathered == "left" else rights[0]).shape[0]

    def kernel(first, token, left, *refs):
        ins, outs = refs[: len(rights)], refs[len(rights) :]
        expert, i, j = grouped.square(pl.program_id(0), down, across)
        rows_of, columns = pl.ds(i * height, height), pl.ds(j * width, width)

        def step(k, totals):
            rows = pl.ds(k * depth, depth)
            through = _Block(rows, None, None, *grouped.token(token[rows], tokens))
            direct = through._replace(tokens=None)
            sides = (through, direct) if gathered == "left" else (direct, through)
            tile = sides[0].load(left, rows_of)
            return tuple(
                total + plgpu.dot(tile, sides[1].load(ref, columns), trans_a=True)
                for total, ref in zip(totals, ins, strict=True)
            )

        steps = grouped.steps(first[expert], first[expert + 1], depth)
        totals = (jnp.zeros((height, width), jnp.float32),) * len(rights)
        totals = jax.lax.fori_loop(*steps, step, totals)
        for total, out in zip(totals, outs, strict=True):
            out[expert, rows_of, columns] = total.astype(out.dtype)

    shapes = [(experts, inner, outer, dtype)] * len(rights)
    return _call(
        "expert_weight_gradients", kernel, experts * down * across, tiles, shapes,
        (plan.first, plan.token, left, *rights),
    )


def _call(name: str, kernel: Callable, programs: int, tiles: Tiles, shapes, operands):
    """Run programs that find their parts of whole arrays themselves."""
    return pl.pallas_call(
        kernel,
        grid=(programs,),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for *shape, dtype in shapes],
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=target_platform() != GPU,
        name=name,
    )(*operands)
