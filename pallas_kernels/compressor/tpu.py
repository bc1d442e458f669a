"""Entries on TPU: blocks of them, whose tokens follow each other; see `tpu_tile`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.compressor.form import Form, Operands
from pallas_kernels.compressor.tpu_fitted import (
    LANES,
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
from pallas_kernels.compressor.tpu_tile import Tile, indices, inverse_rms, lanes, swapped
from pallas_kernels.rounding import E4M3, nearest


def forward(x: Operands, form: Form) -> Float[Array, "b c k"]:
    """Compute `reference.compress` of entries whose block i begins at token i * ratio."""
    b, c = x.cos.shape[:2]
    sizes = sizes_of(x)
    entries = sizes.rows.entries

    def kernel(*refs):
        *refs, out, values, gates, average = refs
        x, before = named(refs, sizes)
        tile = Tile(x, before, sizes, values, gates)

        @pl.loop(0, sizes.lanes // LANES)
        def _(lane):
            pooled = tile.pool(lane)
            average[:, lanes(lane)] = pooled.sums / pooled.total

        pooled = average[...]
        normed = pooled * inverse_rms(pooled, sizes.width, form.eps) * x.norm[...]
        normed = normed.astype(form.dtype).astype(jnp.float32)
        plain, tail = normed[:, : sizes.tail], normed[:, sizes.tail :]
        tail = tail * x.turn[...] + swapped(tail) * x.swap[...]
        if form.rounded:
            tail = tail.astype(form.dtype).astype(jnp.float32)
            plain, tail = _rounded(plain, 0, sizes), _rounded(tail, sizes.tail, sizes)
        if sizes.tail:
            out[:, : sizes.tail] = plain.astype(out.dtype)
        out[:, sizes.tail :] = tail.astype(out.dtype)

    operands = arrays(fit(x, sizes))
    shape = jax.ShapeDtypeStruct((b, sizes.blocks * entries, sizes.lanes), form.dtype)
    result = pl.pallas_call(
        kernel, grid=(b, sizes.blocks), in_specs=specs(sizes, lambda i: i),
        out_specs=pl.BlockSpec((None, entries, sizes.lanes), lambda b, i: (b, i, 0)),
        out_shape=shape,
        scratch_shapes=[*token_scratch(sizes), floats(entries, sizes.lanes)],
        **options("compress", "parallel", operands, shape),
    )(*operands)
    return result[:, :c, : sizes.width]


def _rounded(x: Float[Array, "e lanes"], first: int, sizes: Sizes) -> Float[Array, "e lanes"]:
    """Round channels from `first` on: to FP8, rotated ones to bfloat16."""
    channel = first + indices(x, 1)
    plain, size = channel < sizes.plain, jnp.abs(x)
    largest = jnp.zeros_like(x)
    for start in range(first, min(first + x.shape[1], sizes.plain), E4M3.group):
        group = plain & (channel >= start) & (channel < start + E4M3.group)
        most = jnp.max(jnp.where(group, size, 0.0), axis=1, keepdims=True)
        largest = jnp.where(group, most, largest)
    turned = x.astype(jnp.bfloat16).astype(jnp.float32)
    return jnp.where(plain, nearest(x, largest, E4M3), turned)
