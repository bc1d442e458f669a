"""The symmetric product on TPU: a triangle of tiles, each copied to its place and its mirror."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.blocks import largest_block, pad_axes
from pallas_kernels.cost import estimate
from pallas_kernels.newton_schulz.index import Triangle
from pallas_kernels.target import TPU, target_platform


class Tiles(NamedTuple):
    """How the work is cut up."""

    block: int  # rows and columns of a tile of the product, at most
    depth: int  # columns of x in one step, at most


TILES = Tiles(512, 1024)
MEMORY = 32 * 2**20  # bytes of VMEM
LANES = 128  # of a vector register: no block is narrower


def symmetric_product(
    x: Float[Array, "z n m"], add: Float[Array, "z n n"] | None, *, scale: float, add_scale: float,
    interpret=None,
) -> Float[Array, "z n n"]:
    """Compute `reference.symmetric_product`; one step for each part of each tile of a triangle.

    Args:
      interpret: as in `pallas_call`; None: where the program is not made for a TPU.
    """
    stack, n, m = x.shape
    block, depth = largest_block(n, TILES.block, LANES), largest_block(m, TILES.depth, LANES)
    x = pad_axes(x, {1: block, 2: depth})
    triangle, steps = Triangle(x.shape[1] // block), x.shape[2] // depth

    def kernel(left, right, *refs):
        *added, out, total, written, mirrored, semaphores = refs
        z, row, column, k = map(pl.program_id, range(4))
        i, j = triangle.tile(row, column)

        @pl.when(k == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        total[...] += jax.lax.dot_general(
            left[...], right[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )

        @pl.when(k == steps - 1)
        def _():
            result = scale * total[...]
            for ref in added:
                result += add_scale * ref[...].astype(jnp.float32)
            down, across = pl.ds(i * block, block), pl.ds(j * block, block)
            own = pltpu.make_async_copy(written, out.at[z, down, across], semaphores.at[0])
            mirror = pltpu.make_async_copy(mirrored, out.at[z, across, down], semaphores.at[1])
            written[...] = result.astype(written.dtype)
            own.start()

            @pl.when(i != j)
            def _():
                mirrored[...] = result.T.astype(mirrored.dtype)
                mirror.start()
                mirror.wait()

            own.wait()

    specs = (
        pl.BlockSpec((None, block, depth), triangle.left),
        pl.BlockSpec((None, block, depth), triangle.right),
        pl.BlockSpec((None, block, block), triangle.own),
    )
    operands = (x, x) if add is None else (x, x, pad_axes(add, {1: block, 2: block}))
    shape = jax.ShapeDtypeStruct((stack, x.shape[1], x.shape[1]), x.dtype)
    out = pl.pallas_call(
        kernel,
        grid=(stack, *triangle.grid, steps),
        in_specs=specs[: len(operands)],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=shape,
        scratch_shapes=[
            pltpu.VMEM((block, block), jnp.float32),
            pltpu.VMEM((block, block), x.dtype),
            pltpu.VMEM((block, block), x.dtype),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=MEMORY,
        ),
        # Half of the square, as it is symmetric.
        cost_estimate=estimate(x.shape[0] * x.shape[1] ** 2 * x.shape[2], x, shape),
        interpret=target_platform() != TPU if interpret is None else interpret,
        name="symmetric_product",
    )(*operands)
    return out[:, :n, :n]
