"""Logits on GPU: one program for each tile, which leaves their exponentials and what is in them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.blocks import largest_block, pad_axes
from pallas_kernels.cross_entropy.index import LogitGrid, Tile
from pallas_kernels.cross_entropy.tiles import LogitTiles
from pallas_kernels.target import GPU, target_platform


class Tiles(NamedTuple):
    """How the work is cut up."""

    tile: Tile  # at most
    depth: int  # of the width in one step, at most
    warps: int
    stages: int  # steps whose loads are under way


TILES = {"bfloat16": Tiles(Tile(128, 256), 64, 8, 4), "float32": Tiles(Tile(64, 128), 32, 8, 3)}
SMALLEST = 16  # tensor cores take no smaller tiles


def tile_for(tokens: int, width: int, dtype: jnp.dtype) -> Tile:
    """Return the tile for so many tokens, which are to be filled up to whole ones."""
    tile = TILES[dtype.name].tile
    return tile._replace(rows=min(tile.rows, max(SMALLEST, pl.next_power_of_2(tokens))))


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
    tiles = TILES[hidden.dtype.name]
    grid = LogitGrid(t, v, tile)
    depth = largest_block(hidden.shape[1], tiles.depth, SMALLEST)
    hidden, head = pad_axes(hidden, {1: depth}), pad_axes(head, {0: depth})
    d, count = hidden.shape[1], grid.grid[1]

    def kernel(hidden_ref, head_ref, targets_ref, maxima, sums, target, written):
        j = pl.program_id(1)
        columns = jnp.arange(tile.columns)
        exists = grid.exists(j, columns)[None]
        mask = exists if v % tile.columns else None

        def step(k, total):
            part = pl.ds(k * depth, depth)
            return total + plgpu.dot(hidden_ref[:, part], plgpu.load(head_ref.at[part], mask=mask))

        logits = jnp.zeros((tile.rows, tile.columns), jnp.float32)
        logits = jax.lax.fori_loop(0, d // depth, step, logits)
        if mask is not None:
            logits = jnp.where(exists, logits, -jnp.inf)
        # Exactly one tile of a row has its target, and writes it.
        wanted = targets_ref[...]
        own = columns == grid.place(j, wanted)[:, None]
        plgpu.store(
            target, jnp.sum(jnp.where(own, logits, 0), axis=1), mask=grid.has(j, wanted)
        )
        largest = jnp.max(logits, axis=1)
        exponentials = jnp.exp(logits - largest[:, None])
        maxima[...], sums[...] = largest, jnp.sum(exponentials, axis=1)
        if exps:
            plgpu.store(written, exponentials.astype(written.dtype), mask=mask)
        else:
            likeliest = jnp.where(logits == largest[:, None], columns, tile.columns)
            written[...] = grid.column(j, jnp.min(likeliest, axis=1))

    statistic = pl.BlockSpec((None, tile.rows), grid.tile_major)
    shape = jax.ShapeDtypeStruct((count, t), jnp.float32)
    logits = pl.BlockSpec(tile, grid.logits)
    *found, written = pl.pallas_call(
        kernel,
        grid=grid.grid,
        in_specs=(
            pl.BlockSpec((tile.rows, d), grid.hidden),
            pl.BlockSpec((d, tile.columns), grid.head),
            pl.BlockSpec((tile.rows,), grid.each_token),
        ),
        out_specs=(
            statistic, statistic, pl.BlockSpec((tile.rows,), grid.each_token),
            logits if exps else statistic,
        ),
        out_shape=(
            shape, shape, jax.ShapeDtypeStruct((t,), jnp.float32),
            jax.ShapeDtypeStruct((t, v), hidden.dtype) if exps
            else jax.ShapeDtypeStruct((count, t), jnp.int32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=target_platform() != GPU,
        name="logit_tiles",
    )(hidden, head, targets)
    maxima, sums, target = found
    written = (written, None) if exps else (None, written.T)
    return LogitTiles(maxima.T, sums.T, target, *written)


def errors(
    exps: Float[Array, "t v"], factors: Float[Array, "t tiles"], targets: Int[Array, " t"],
    own: Float[Array, " t"], tile: Tile,
) -> Float[Array, "t v"]:
    """Return exps times their tile's factor, but `own` at the target, in the memory of exps."""
    grid = LogitGrid(*exps.shape, tile)

    def kernel(exps_ref, factors_ref, targets_ref, own_ref, out):
        j = pl.program_id(1)
        columns = jnp.arange(tile.columns)
        mask = grid.exists(j, columns)[None] if exps.shape[1] % tile.columns else None
        error = plgpu.load(exps_ref, mask=mask).astype(jnp.float32) * factors_ref[...][:, None]
        is_own = columns == grid.place(j, targets_ref[...])[:, None]
        error = jnp.where(is_own, own_ref[...][:, None], error)
        plgpu.store(out, error.astype(out.dtype), mask=mask)

    logits = pl.BlockSpec(tile, grid.logits)
    token = pl.BlockSpec((tile.rows,), grid.each_token)
    return pl.pallas_call(
        kernel,
        grid=grid.grid,
        in_specs=(logits, pl.BlockSpec((None, tile.rows), grid.tile_major), token, token),
        out_specs=logits,
        out_shape=jax.ShapeDtypeStruct(exps.shape, exps.dtype),
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=8),
        interpret=target_platform() != GPU,
        name="errors",
    )(exps, factors.T, targets, own)
