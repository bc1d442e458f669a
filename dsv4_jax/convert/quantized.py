"""Quantised leaves: codes and scales as a checkpoint has them, in place of a weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dsv4_jax.convert.table import Layout
from dsv4_jax.quant import E4M3, E8M0, FP4, Block, Format


class Quantized(struct.PyTreeNode):
    """A weight whose matrices are stored as codes and scales.

    Both keep the axes of the checkpoint, [output, input], behind the leaf's stacked layers and
    experts, so that its bytes come out again as they went in. FP4 codes are uint8, two in a byte
    along the input; FP8 codes are float8_e4m3fn. Scales are float8_e8m0fnu or float32.
    """

    codes: jax.Array
    scales: jax.Array
    form: Format = struct.field(pytree_node=False)
    layout: Layout = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return (*self.codes.shape[:-2], *self.layout.sizes)

    def block(self, index: tuple[int, ...]) -> Block:
        """Return the stored bytes of one matrix, on the host."""
        codes = np.asarray(self.codes[index]).view(np.uint8)
        return Block(codes, self.stored_scales(index), self.form)

    def stored_scales(self, index: tuple[int, ...]) -> np.ndarray:
        """Return the stored scales of one matrix, on the host."""
        scales = np.asarray(self.scales[index])
        return scales.view(np.uint8) if scales.dtype == E8M0 else scales

    def dequantize(self, dtype: jnp.dtype) -> jax.Array:
        """Return the weight; runs under `jit`.

        Products below float32's smallest normal number, 2^-126, may become 0 on some devices.
        """
        form = self.form
        if form is FP4:
            table = jnp.asarray(np.arange(16, dtype=np.uint8).view(form.codes).astype(np.float32))
            halves = jnp.stack([self.codes & 15, self.codes >> 4], axis=-1)
            values = table[halves].reshape(*self.codes.shape[:-1], -1)
        else:
            values = self.codes.astype(jnp.float32)
        scales = self.scales.astype(jnp.float32)
        for axis, size in ((-2, form.block[0]), (-1, form.block[1])):
            scales = jnp.repeat(scales, size, axis=axis)
        values = values * scales[..., : values.shape[-2], : values.shape[-1]]
        to_leaf = self.layout.to_leaf
        for _ in self.codes.shape[:-2]:
            to_leaf = jax.vmap(to_leaf)
        return to_leaf(values.astype(dtype))


def code_dtypes(form: Format, scales: np.dtype) -> tuple[np.dtype, np.dtype]:
    """Return the dtypes of the codes and scales of leaves."""
    return (np.dtype(np.uint8) if form is FP4 else E4M3), E8M0 if scales == np.uint8 else scales


def dequantize(params: dict, dtype=jnp.bfloat16) -> dict:
    """Return parameters in which every quantised leaf is a weight of the given dtype."""
    return jax.tree.map(
        lambda leaf: leaf.dequantize(dtype) if isinstance(leaf, Quantized) else leaf,
        params, is_leaf=lambda leaf: isinstance(leaf, Quantized),
    )
