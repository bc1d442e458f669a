"""The symmetric product on GPU: one triangle of tiles, each written with its mirror image."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.blocks import largest_block, pad_axes
from pallas_kernels.newton_schulz.index import Triangle
from pallas_kernels.target import GPU, target_platform


class Tiles(NamedTuple):
    """How the work is cut up."""

    block: int  # rows and columns of a tile of the product, at most
    depth: int  # columns of x in one step
    warps: int
    stages: int  # steps whose loads are under way


TILES = {"bfloat16": Tiles(128, 64, 8, 4), "float32": Tiles(128, 32, 8, 3)}
SMALLEST = 16  # tensor cores take no smaller tiles


def symmetric_product(
    x: Float[Array, "z n m"], add: Float[Array, "z n n"] | None, *, scale: float, add_scale: float
) -> Float[Array, "z n n"]:
    """Compute `reference.symmetric_product`; one program for each tile of a triangle."""
    tiles = TILES[x.dtype.name]
    stack, n, m = x.shape
    block = largest_block(n, tiles.block, SMALLEST)
    depth = largest_block(m, tiles.depth, SMALLEST)
    x = pad_axes(x, {1: block, 2: depth})
    triangle = Triangle(x.shape[1] // block)

    def kernel(left, right, *refs):
        *added, out = refs

        def step(k, total):
            part = pl.ds(k * depth, depth)
            return total + plgpu.dot(left[:, part], right[:, part], trans_b=True)

        total = jnp.zeros((block, block), jnp.float32)
        total = scale * jax.lax.fori_loop(0, x.shape[2] // depth, step, total)
        for ref in added:
            total += add_scale * ref[...].astype(jnp.float32)
        total = total.astype(out.dtype)
        i, j = triangle.tile(pl.program_id(1), pl.program_id(2))
        down, across = pl.ds(i * block, block), pl.ds(j * block, block)
        out[down, across] = total

        @pl.when(i != j)
        def _():
            out[across, down] = total.T

    specs = (
        pl.BlockSpec((None, block, x.shape[2]), triangle.left),
        pl.BlockSpec((None, block, x.shape[2]), triangle.right),
        pl.BlockSpec((None, block, block), triangle.own),
    )
    whole = (stack, x.shape[1], x.shape[1])
    operands = (x, x) if add is None else (x, x, pad_axes(add, {1: block, 2: block}))
    out = pl.pallas_call(
        kernel,
        grid=(stack, *triangle.grid),
        in_specs=specs[: len(operands)],
        out_specs=pl.BlockSpec((None, *whole[1:]), lambda z, *_: (z, 0, 0)),
        out_shape=jax.ShapeDtypeStruct(whole, x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=target_platform() != GPU,
        name="symmetric_product",
    )(*operands)
    return out[:, :n, :n]
