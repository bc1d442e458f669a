"""The backward pass of entries on TPU: from the last block to the first.

With two series, what the first entry of a step passes back to the block before it is carried over.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.blocks import pad_axes
from pallas_kernels.compressor.form import Form, Operands
from pallas_kernels.compressor.tpu_fitted import (
    LANES,
    Fitted,
    Sizes,
    arrays,
    fit,
    floats,
    named,
    options,
    sizes_of,
    specs,
    token_scratch,
)
from pallas_kernels.compressor.tpu_tile import (
    LARGE,
    Tile,
    earlier_rows,
    inverse_rms,
    lanes,
    swapped,
)


class Grads(NamedTuple):
    """What the kernel writes."""

    values: Float[Array, "b t columns"]
    gates: Float[Array, "b t columns"]
    bias: Float[Array, "b u rows k"]
    norm: Float[Array, "b 1 k"]


class Kept(NamedTuple):
    """Of each entry, what its tokens' gradients are made of."""

    largest: Float[Array, "e k"]
    share: Float[Array, "e k"]  # of the average's gradient: divided by the softmax's denominator
    average: Float[Array, "e k"]


def gradients(
    x: Operands, grad: Float[Array, "b c k"], form: Form
) -> tuple[Array, Array, Array, Array]:
    """Return the gradients of values, gates, bias and norm."""
    sizes = sizes_of(x)
    (b, t), width, entries = x.values.shape[:2], sizes.width, sizes.rows.entries
    series, k = sizes.series, sizes.lanes
    grad = pad_axes(grad, {2: LANES})
    grad = jnp.pad(grad, ((0, 0), (0, sizes.blocks * entries - grad.shape[1]), (0, 0)))
    fitted = fit(x, sizes)

    def kernel(*refs):
        *operands, grad = refs[: -len(Grads._fields) - 6]
        grads, scratch = Grads(*refs[-len(Grads._fields) - 6 : -6]), refs[-6:]
        (values, gates), kept, passed = scratch[:2], Kept(*scratch[2:5]), scratch[5]
        tile = Tile(*named(operands, sizes), sizes, values, gates)

        @pl.when(pl.program_id(1) == 0)
        def _():
            grads.bias[...] = jnp.zeros_like(grads.bias)
            grads.norm[...] = jnp.zeros_like(grads.norm)
            passed[0] = jnp.full((1, k), LARGE)
            passed[1] = passed[2] = jnp.zeros((1, k))

        _keep(tile, kept, grad, grads.norm, form.eps)

        @pl.loop(0, k // LANES)
        def _(lane):
            _tokens(tile, lane, kept, passed, grads)

    def place(step):
        return sizes.rows.from_last(step, sizes.blocks)

    def of(length: int, columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, length, columns), lambda b, i: (b, place(i), 0))

    tokens = of(sizes.rows.tokens, series * k)
    shapes = Grads(fitted.values.shape, fitted.gates.shape, (b, *fitted.bias.shape), (b, 1, k))
    outputs = Grads(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    operands = (*arrays(fitted), grad)
    grads = Grads(*pl.pallas_call(
        kernel, grid=(b, sizes.blocks), in_specs=[*specs(sizes, place), of(entries, k)],
        out_specs=Grads(
            tokens, tokens,
            pl.BlockSpec((None, *fitted.bias.shape), lambda b, i: (b, 0, 0, 0)),
            pl.BlockSpec((None, 1, k), lambda b, i: (b, 0, 0)),
        ),
        out_shape=outputs,
        scratch_shapes=[*token_scratch(sizes), *[floats(entries, k)] * 3, floats(3, 1, k)],
        **options("compress_gradients", "arbitrary", operands, outputs),
    )(*operands))
    rows = (g[:, :t].reshape(b, t, series, k)[..., :width] for g in grads[:2])
    bias = jnp.sum(grads.bias.reshape(b, series, -1, sizes.rows.ratio, k), axis=(0, 2))
    bias = bias.swapaxes(0, 1)[..., :width]
    return *rows, bias, jnp.sum(grads.norm, axis=(0, 1))[:width]


def _keep(tile: Tile, kept: Kept, grad, grad_norm, eps: float) -> None:
    """Pool all entries, and go back through their normalisation."""
    x, sizes = tile.x, tile.sizes

    @pl.loop(0, sizes.lanes // LANES)
    def _(lane):
        pooled, at = tile.pool(lane), lanes(lane)
        kept.largest[:, at] = pooled.largest
        kept.share[:, at] = 1 / pooled.total
        kept.average[:, at] = pooled.sums / pooled.total

    grad, average = _turned_back(grad[...].astype(jnp.float32), x, sizes), kept.average[...]
    inverse = inverse_rms(average, sizes.width, eps)
    grad_norm[...] += jnp.sum(grad * average * inverse, axis=0, keepdims=True)
    grad = grad * x.norm[...]
    along = jnp.sum(grad * average, axis=1, keepdims=True) * inverse * inverse / sizes.width
    kept.share[...] *= inverse * (grad - average * along)


def _turned_back(
    grad: Float[Array, "e k"], x: Fitted, sizes: Sizes
) -> Float[Array, "e k"]:
    """Return the gradient of entries before their rotation."""
    tail = grad[:, sizes.tail :]
    tail = tail * x.turn[...] + swapped(tail * x.swap[...])
    return jnp.concatenate([grad[:, : sizes.tail], tail], axis=1) if sizes.tail else tail


def _tokens(tile: Tile, lane, kept: Kept, passed, grads: Grads) -> None:
    """Write the gradients of 128 channels of all tokens."""
    sizes, at = tile.sizes, lanes(lane)
    own = Kept(*(ref[:, at] for ref in kept))
    sides = [own]
    if sizes.series == 2:
        # No gate is near LARGE: where no block is before, nothing is passed back to it.
        there = tile.x.previous[...] > 0
        back = own._replace(
            largest=jnp.where(there, own.largest, LARGE), share=jnp.where(there, own.share, 0.0)
        )
        sides = [Kept(*(earlier_rows(v, passed[i, :, at]) for i, v in enumerate(back))), own]
        for i, v in enumerate(back):
            passed[i, :, at] = v[:1]
    for u, side in enumerate(sides):
        tile.pass_back(u, lane, *side, grads.bias)
        columns = lanes(u * (sizes.lanes // LANES) + lane)
        grads.values[:, columns] = tile.values[...]
        grads.gates[:, columns] = tile.gates[...]
