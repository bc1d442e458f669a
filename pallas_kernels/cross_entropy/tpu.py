"""Logits on TPU: a tile in each step, whose exponentials and what is in them are left."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.blocks import largest_block, pad_axes
from pallas_kernels.cost import estimate
from pallas_kernels.cross_entropy.index import LANES, LogitGrid, Tile
from pallas_kernels.cross_entropy.tiles import LogitTiles
from pallas_kernels.index_math import cdiv
from pallas_kernels.target import TPU, target_platform

TILE = Tile(1024, 512)  # at most: each byte of the head serves as many products as there are rows
WHOLE = 512  # rows; more are filled up to a multiple of this
DEPTH = 256  # of the width in one product, at most
STRETCH = 512  # rows whose logits are looked at together, at most: their latencies overlap
SMALLEST = 16  # rows of bfloat16 that registers hold packed
RESIDENT = 16 * 2**20  # bytes of a tile's tokens, at most, which stay while ids go by
VMEM = 48 * 2**20


def tile_for(tokens: int, width: int, dtype: jnp.dtype) -> Tile:
    """Return the tile for so many tokens, which are to be filled up to whole ones."""
    if tokens < WHOLE:
        rows = max(SMALLEST, pl.next_power_of_2(tokens))
    else:
        rows = largest_block(tokens, TILE.rows, WHOLE)
    while rows > SMALLEST and rows * width * dtype.itemsize > RESIDENT:
        rows //= 2
    return TILE._replace(rows=rows)


def logit_tiles(
    hidden: Float[Array, "t d"], head: Float[Array, "d v"], targets: Int[Array, " t"], tile: Tile,
    *, exps: bool,
) -> LogitTiles:
    """Compute the logits hidden head and return what `LogitTiles` has of them.

    Args:
      hidden: of the dtype of head.
      tile: one for so many whole rows, of `tile_for`.
      exps: return exponentials, else winners.
    """
    t, v = hidden.shape[0], head.shape[1]
    grid = LogitGrid(t, v, tile)
    hidden, head = pad_axes(hidden, {1: LANES}), pad_axes(head, {0: LANES})
    d, count = hidden.shape[1], grid.grid[1]

    depth, stretch = largest_block(d, DEPTH, LANES), min(STRETCH, tile.rows)

    def kernel(hidden_ref, head_ref, targets_ref, maxima, sums, target, written, total):
        j = pl.program_id(1)

        @pl.when(j == 0)
        def _():
            target[...] = jnp.zeros_like(target)

        def product(k):
            part = pl.ds(k * depth, depth)
            return jnp.dot(hidden_ref[:, part], head_ref[part], preferred_element_type=jnp.float32)

        total[...] = product(0)

        @pl.loop(1, d // depth)
        def _(k):
            total[...] += product(k)

        @pl.loop(0, tile.rows // stretch)
        def _(r):
            rows = pl.ds(r * stretch, stretch)
            logits = total[rows]
            columns = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
            if v % tile.columns:  # beyond the ids there is anything in the head's last block
                logits = jnp.where(grid.exists(j, columns), logits, -jnp.inf)
            largest = jnp.max(logits, axis=1, keepdims=True)
            exponentials = jnp.exp(logits - largest)
            lane = jax.lax.broadcasted_iota(jnp.int32, (stretch, LANES), 1) == grid.lane(j)

            def note(ref, column):
                ref[rows] = jnp.where(lane, column, ref[rows])

            note(maxima, largest)
            note(sums, jnp.sum(exponentials, axis=1, keepdims=True))
            # Exactly one tile of a row has its target: all others add 0.
            own = columns == grid.place(j, targets_ref[rows])
            found = jnp.where(own, logits, 0)
            target[rows] += jnp.sum(found, axis=1, keepdims=True)
            if exps:
                written[rows] = exponentials.astype(written.dtype)
            else:
                likeliest = jnp.where(logits == largest, columns, tile.columns)
                likeliest = jnp.min(likeliest, axis=1, keepdims=True)
                note(written, grid.column(j, likeliest))

    statistic = pl.BlockSpec((tile.rows, LANES), grid.lanes)
    column = pl.BlockSpec((tile.rows, 1), grid.column_of_tokens)
    lanes = cdiv(count, LANES) * LANES
    shape = jax.ShapeDtypeStruct((t, lanes), jnp.float32)
    if exps:
        kept = jax.ShapeDtypeStruct((t, v), hidden.dtype)
    else:
        kept = jax.ShapeDtypeStruct((t, lanes), jnp.int32)
    *found, target, written = pl.pallas_call(
        kernel,
        grid=grid.grid,
        in_specs=(
            # Changes once in a row of tiles: a second buffer would not be worth its memory.
            pl.BlockSpec((tile.rows, d), grid.hidden, pipeline_mode=pl.Buffered(1)),
            pl.BlockSpec((d, tile.columns), grid.head),
            column,
        ),
        out_specs=(
            statistic, statistic, column,
            pl.BlockSpec(tile, grid.logits) if exps else statistic,
        ),
        out_shape=(
            shape, shape, jax.ShapeDtypeStruct((t, 1), jnp.float32), kept,
        ),
        scratch_shapes=[pltpu.VMEM(tile, jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=estimate(2 * t * d * v, hidden, head, kept),
        interpret=target_platform() != TPU,
        name="logit_tiles",
    )(hidden, head, targets[:, None])
    maxima, sums = (x[:, :count] for x in found)
    written = (written, None) if exps else (None, written[:, :count])
    return LogitTiles(maxima, sums, target[:, 0], *written)


def errors(
    exps: Float[Array, "t v"], factors: Float[Array, "t tiles"], targets: Int[Array, " t"],
    own: Float[Array, " t"], tile: Tile,
) -> Float[Array, "t v"]:
    """Return exps times their tile's factor, but `own` at the target, in the memory of exps."""
    grid = LogitGrid(*exps.shape, tile)

    def kernel(exps_ref, factors_ref, targets_ref, own_ref, out):
        j = pl.program_id(1)
        lane = jax.lax.broadcasted_iota(jnp.int32, factors_ref.shape, 1) == grid.lane(j)
        factor = jnp.sum(jnp.where(lane, factors_ref[...], 0), axis=1, keepdims=True)
        columns = jax.lax.broadcasted_iota(jnp.int32, out.shape, 1)
        is_own = columns == grid.place(j, targets_ref[...])
        error = jnp.where(is_own, own_ref[...], exps_ref[...].astype(jnp.float32) * factor)
        out[...] = error.astype(out.dtype)

    logits = pl.BlockSpec(tile, grid.logits)
    column = pl.BlockSpec((tile.rows, 1), grid.column_of_tokens)
    return pl.pallas_call(
        kernel,
        grid=grid.grid,
        in_specs=(logits, pl.BlockSpec((tile.rows, LANES), grid.lanes), column, column),
        out_specs=logits,
        out_shape=jax.ShapeDtypeStruct(exps.shape, exps.dtype),
        input_output_aliases={0: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=estimate(0, exps, exps),
        interpret=target_platform() != TPU,
        name="errors",
    )(exps, pad_axes(factors, {1: LANES}), targets[:, None], own[:, None])
