"""Routed experts on TPU: products of blocks of rows with their expert's weights.

XLA copies the rows of tokens to rows of experts first: at Flash's widths that moves 2 (d + d) bytes
a row, while the products take 6 d f operations. A step of the grid holds a tile of an expert's
weights that spans all that is summed over, so that it stays while the expert's blocks pass.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.blocks import largest_block
from pallas_kernels.codes import BYTES, powers
from pallas_kernels.cost import estimate
from pallas_kernels.moe.formats import Fp4, decode
from pallas_kernels.moe.index import Grouped
from pallas_kernels.moe.plan import Plan, dispatch, make_visits
from pallas_kernels.moe.swiglu import clamped_swiglu, rounded, swiglu_gradients
from pallas_kernels.target import TPU, target_platform

UNIT = 128  # lanes of a vector register: no block is narrower
WIDTH = 512  # columns of a tile of rows, at most
SQUARE = 1024  # rows and columns of a tile of the weights' gradient, at most
HELD = 8 * 2**20  # bytes of weights for one step, at most
MEMORY = 48 * 2**20  # bytes of VMEM: v5p and tpu7x have 64 MiB


def hidden(
    x: Float[Array, "t d"], plan: Plan, share: Float[Array, "rows 1"],
    gate: Float[Array, "e d f"] | Fp4, up: Float[Array, "e d f"] | Fp4, *, limit: float,
    keep: bool,
) -> list[Float[Array, "rows f"]]:
    """Return the weighted hidden layer of each row; to keep also both products it is made of."""

    def finish(sums, refs):
        share, *outs = refs
        value = clamped_swiglu(*sums, limit) * share[...]
        outs[0][...] = value.astype(x.dtype)
        for out, result in zip(outs[1:], sums, strict=False):
            out[...] = rounded(result, limit, x.dtype)

    return _by_block(
        "expert_hidden", finish, plan, (dispatch(x, plan),), (gate, up), (share,),
        turned=isinstance(gate, Fp4), outs=[x.dtype] * (3 if keep else 1),
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
    """Return the hidden layer, the gradients of both its products and that of each row's weight."""

    def finish(sums, refs):
        share, gate, up, value, grad_gate, grad_up, grad_share = refs
        gates, ups = (ref[...].astype(jnp.float32) for ref in (gate, up))
        plain = clamped_swiglu(gates, ups, limit)
        value[...] = (plain * share[...]).astype(value.dtype)
        grads = swiglu_gradients(gates, ups, sums[0] * share[...], limit)
        grad_gate[...], grad_up[...] = (g.astype(gate.dtype) for g in grads)
        grad_share[...] = jnp.sum(sums[0] * plain, axis=1, keepdims=True)

    *results, parts = _by_block(
        "expert_hidden_gradients", finish, plan, (dispatch(grad, plan),), (down,),
        (share, gate, up), turned=True, outs=[grad.dtype] * 3, sums=True,
    )
    return [*results, jnp.sum(parts, axis=(0, 2))]


def row_gradients(
    grad_gate: Float[Array, "rows f"], grad_up: Float[Array, "rows f"], plan: Plan,
    gate: Float[Array, "e d f"], up: Float[Array, "e d f"],
) -> Float[Array, "rows d"]:
    """Return the gradient of each row's token."""
    (rows,) = _by_block(
        "expert_row_gradients", _store_sum, plan, (grad_gate, grad_up), (gate, up), (), turned=True
    )
    return rows


def _store_sum(sums, refs) -> None:
    refs[0][...] = sums[0].astype(refs[0].dtype)


def _by_block(
    name: str, finish: Callable, plan: Plan, lefts: tuple[Array, ...], weights: tuple[Array, ...],
    others: tuple[Array, ...], *, turned: bool, outs=None, sums: bool = False,
) -> list[Array]:
    """Multiply each block's rows with its expert's weights, a step for each tile of a block.

    Several left factors are summed, one with several weights is multiplied with each.

    Args:
      finish: stores the products, given the refs of `others` and of the results.
      turned: sum over the weights' last axis.
      outs: dtypes of results; None: one, that of the left factors.
      sums: one more result, float32 [tiles, rows, 1].
    """
    rows, blocks = plan.source.size, plan.owner.size
    grouped, count = Grouped(rows // blocks), len(weights)
    inner, dtype = lefts[0].shape[1], lefts[0].dtype
    packed = isinstance(weights[0], Fp4)
    columns = jax.tree.leaves(weights)[0].shape[1 if turned else 2]
    width = _width(columns, inner, count * dtype.itemsize)
    matrices, scratch, spread = list(weights), [], []
    if packed:
        matrices = [part for w in weights for part in (w.codes, w.scales)]
        scratch = [pltpu.VMEM((2, width, inner // 2), dtype)] * count
        spread = [_spread(inner)]

    def kernel(owner, used, *refs):
        ins, refs = refs[: len(lefts)], refs[len(lefts) :]
        held, rest = refs[: len(matrices)], refs[len(matrices) + len(spread) :]
        rest, decoded = rest[: len(rest) - len(scratch)], rest[len(rest) - len(scratch) :]
        if packed:
            _decode(grouped.first(pl.program_id(1), owner), refs[len(matrices)], held, decoded)

        @pl.when(pl.program_id(1) < used[0])
        def _():
            lefts = [ref[...] for ref in ins] * (count // len(ins))
            if packed:
                totals = [
                    sum(_dot(_half(lefts[0], k), ref[k], 1, 1) for k in (0, 1)) for ref in decoded
                ]
            else:
                totals = [
                    _dot(left, ref[...], 1, 1 if turned else 0)
                    for left, ref in zip(lefts, held, strict=True)
                ]
            finish([sum(totals)] if len(ins) > 1 else totals, rest)

    tile = pl.BlockSpec((grouped.size, width), grouped.tile_at)
    one = pl.BlockSpec((grouped.size, 1), grouped.rows_at)
    at = grouped.turned_at if turned else grouped.columns_at
    shapes = [(None, width, m.shape[2]) if turned else (None, inner, width) for m in matrices]
    weight_specs = [pl.BlockSpec(shape, at) for shape in shapes]
    shapes = [jax.ShapeDtypeStruct((rows, columns), d) for d in outs or [lefts[0].dtype]]
    out_specs = [tile] * len(shapes)
    if sums:
        shapes.append(jax.ShapeDtypeStruct((columns // width, rows, 1), jnp.float32))
        out_specs.append(pl.BlockSpec((None, grouped.size, 1), grouped.part_at))
    steps = columns // width
    filled = plan.expected_rows(grouped.size)
    read = [jax.ShapeDtypeStruct((filled, y.shape[1]), y.dtype) for y in (*lefts * steps, *others)]
    written = [jax.ShapeDtypeStruct((filled, columns), y.dtype) for y in shapes if y.ndim == 2]
    cost = estimate(2 * filled * inner * columns * count, read, matrices, written)
    specs = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(steps, blocks),
        in_specs=[
            *[pl.BlockSpec((grouped.size, inner), grouped.rows_at)] * len(lefts),
            *weight_specs,
            *[pl.BlockSpec(s.shape, lambda *_: (0, 0)) for s in spread],
            *[one if x.shape[1] == 1 else tile for x in others],
        ],
        out_specs=out_specs,
        scratch_shapes=scratch,
    )
    operands = (plan.owner, plan.used, *lefts, *matrices, *spread, *others)
    return _call(name, kernel, specs, shapes, operands, cost)


def _spread(inner: int) -> Array:
    """Return the matrix that repeats each scale for its codes, when multiplied from the right."""
    scale = jnp.arange(inner // 2 // BYTES)[:, None]
    return (jnp.arange(inner // 2) // BYTES == scale).astype(jnp.bfloat16)


def _decode(fresh, spread, held, decoded) -> None:
    """Decode an expert's weights once for all of its blocks.

    Products with ones and zeros repeat the scales, which are powers of two: exact in bfloat16.
    """

    @pl.when(fresh)
    def _():
        for codes, scales, values in zip(held[::2], held[1::2], decoded, strict=True):
            scale = _dot(powers(scales[...]).astype(jnp.bfloat16), spread[...], 1, 0)
            for half, value in enumerate(decode(codes[...], scale, values.dtype)):
                values[half] = value


def _half(x: Array, which: int) -> Array:
    """Return the even columns of rows, which come first, or the odd ones."""
    half = x.shape[1] // 2
    return x[:, which * half : (which + 1) * half]


def _width(columns: int, inner: int, bytes_each: int) -> int:
    """Return the columns of a tile: as many as the weights' share of the memory holds."""
    most = WIDTH
    while most > UNIT and most * inner * bytes_each > HELD:
        most //= 2
    return largest_block(columns, most, UNIT)


def _dot(left: Array, right: Array, of_left: int, of_right: int) -> Array:
    return jax.lax.dot_general(
        left, right, (((of_left,), (of_right,)), ((), ())), preferred_element_type=jnp.float32
    )


def weight_gradients(
    left: Float[Array, "n i"], rights: tuple[Float[Array, "m j"], ...], plan: Plan, *,
    gathered: str, dtype,
) -> list[Float[Array, "e i j"]]:
    """Return left^T right over the rows of each expert, a step for each visit of each tile.

    An expert's blocks pass one after the other while the sum stays; one without any is visited to
    write zeros.

    Args:
      gathered: "left" or "right", the factor whose rows are tokens'; the other's are experts'.
    """
    if gathered == "left":
        left = dispatch(left, plan)
    else:
        rights = tuple(dispatch(right, plan) for right in rights)
    rows, inner, outer = plan.source.size, left.shape[1], rights[0].shape[1]
    grouped = Grouped(rows // plan.owner.size)
    visits = make_visits(plan, grouped.size)
    number = visits.expert.size
    square = SQUARE if left.dtype.itemsize == 2 else SQUARE // 2
    height, width = (largest_block(length, square, UNIT) for length in (inner, outer))

    def kernel(expert, block, filled, left, *refs):
        ins, outs, totals = (refs[k * len(rights) :][: len(rights)] for k in range(3))
        visit = pl.program_id(2)

        @pl.when(grouped.first(visit, expert))
        def _():
            for total in totals:
                total[...] = jnp.zeros_like(total)

        @pl.when(filled[visit] == 1)
        def _():
            for total, right in zip(totals, ins, strict=True):
                total[...] += _dot(left[...], right[...], 0, 0)

        @pl.when(grouped.last(visit, number, expert))
        def _():
            for out, total in zip(outs, totals, strict=True):
                out[...] = total[...].astype(out.dtype)

    specs = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(inner // height, outer // width, number),
        in_specs=[
            pl.BlockSpec((grouped.size, height), grouped.left_at),
            *[pl.BlockSpec((grouped.size, width), grouped.right_at)] * len(rights),
        ],
        out_specs=[pl.BlockSpec((None, height, width), grouped.weights_at)] * len(rights),
        scratch_shapes=[pltpu.VMEM((height, width), jnp.float32)] * len(rights),
    )
    shape = jax.ShapeDtypeStruct((plan.first.size - 1, inner, outer), dtype)
    shapes, filled = [shape] * len(rights), plan.expected_rows(grouped.size)
    read = [jax.ShapeDtypeStruct((filled, y.shape[1]), y.dtype)
            for y in (left,) * (outer // width) + rights * (inner // height)]
    cost = estimate(2 * filled * inner * outer * len(rights), read, shapes)
    operands = (*visits, left, *rights)
    return _call("expert_weight_gradients", kernel, specs, shapes, operands, cost)


def _call(
    name: str, kernel: Callable, specs, shapes, operands, cost: pl.CostEstimate
) -> list[Array]:
    """Run the steps of the last axis in their order, for results stay until all of them passed."""
    order = ("parallel",) * (len(specs.grid) - 1) + ("arbitrary",)
    return pl.pallas_call(
        kernel,
        grid_spec=specs,
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=order, vmem_limit_bytes=MEMORY
        ),
        cost_estimate=cost,
        interpret=target_platform() != TPU,
        name=name,
    )(*operands)
