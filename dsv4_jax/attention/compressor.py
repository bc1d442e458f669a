"""Compress blocks of tokens into single entries by gated pooling."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv4_jax.attention.layout import EntryLayout
from dsv4_jax.cache import Pending, Span, after_ring, write_ring
from dsv4_jax.cache_format import round_entry
from dsv4_jax.config import ModelConfig, Runtime
from dsv4_jax.layers import project, rms_norm
from dsv4_jax.params import param
from dsv4_jax.rope import Rotation, rotate
from dsv4_jax.shapes import Array, Entries, Float, Hidden, Int
from pallas_kernels import compressor
from pallas_kernels.implementation import XLA


class EarlierTokens(NamedTuple):
    """What a compressor needs of the tokens that earlier calls have read."""

    pending: Pending
    layer: Int[Array, ""]  # which of the stacked ones is meant
    span: Span  # of the tokens of this call


def pool(values: Float[Array, "b c p k"], gates: Float[Array, "b c p k"]) -> Entries:
    """Average the tokens of each block: sum_p softmax_p(gates) * values, per channel, float32."""
    weights = jax.nn.softmax(gates.astype(jnp.float32), axis=2)
    return jnp.sum(weights * values.astype(jnp.float32), axis=2)


def take_blocks(x: Float[Array, "b t ..."], layout: EntryLayout, ratio: int) -> Array:
    """Return the tokens of every entry's block, [b, c, ratio, ...]."""
    b, t = x.shape[:2]
    if layout.start is None:
        whole = t - t % ratio
        return x[:, :whole].reshape(b, whole // ratio, ratio, *x.shape[2:])
    index = layout.start[..., None] + jnp.arange(ratio)
    return jax.vmap(lambda row, i: row[i])(x, index)


def overlap(
    blocks: Float[Array, "b c p u k"], layout: EntryLayout, fill: float
) -> Float[Array, "b c two_p k"]:
    """Join series 0 of the preceding block of the document to series 1 of the own block.

    Where no block precedes, `fill` stands instead.

    Source: report 2.3.1, whose C^b is series 0 and C^a series 1.
    """
    before = blocks[:, :, :, 0]
    before = jnp.pad(before, ((0, 0), (1, 0), (0, 0), (0, 0)), constant_values=fill)[:, :-1]
    if layout.has_previous is not None:
        before = jnp.where(layout.has_previous[..., None, None], before, fill)
    return jnp.concatenate([before, blocks[:, :, :, 1]], axis=2)


def keep_pending(
    values: Float[Array, "b t *u k"], gates: Float[Array, "b t *u k"], earlier: EarlierTokens
) -> Pending:
    """Return what is kept of the rows' last tokens, those of this call included."""
    pending, layer, span = earlier
    return Pending(
        write_ring(pending.values, layer, values, span),
        write_ring(pending.gates, layer, gates, span),
    )


class Compressor(nn.Module):
    """One entry per block of `ratio` tokens: project, pool, normalise, rotate, perhaps round.

    With `overlapping` (CSA, its indexer) an entry also covers the preceding block, through a
    series of projections of its own; otherwise (HCA) blocks are disjoint.
    """

    config: ModelConfig
    runtime: Runtime
    ratio: int
    width: int
    overlapping: bool
    rounded: bool = False  # as key-value entries come back from a served cache

    @nn.compact
    def __call__(
        self, x: Hidden, layout: EntryLayout, at: Rotation, earlier: EarlierTokens | None = None
    ) -> tuple[Entries, Pending | None]:
        """Return the entries in the dtype of x, and the cache's pending tokens.

        Args:
          at: the rotation at each block's start.
          earlier: what is kept of the rows' earlier tokens; None: there are none.
        """
        d, series = x.shape[-1], (2,) * self.overlapping
        axes, bias_axes = ("series | width -> entry", "slot series entry")
        if not self.overlapping:
            axes, bias_axes = axes.removeprefix("series | "), "slot entry"
        w_kv = param(self, "w_kv", axes, (*series, d, self.width))
        w_gate = param(self, "w_gate", axes, (*series, d, self.width))
        bias = param(
            self, "position_bias", bias_axes, (self.ratio, *series, self.width),
            nn.initializers.zeros,
        )
        norm = param(self, "norm", "entry", (self.width,), nn.initializers.ones)

        # The reference multiplies in float32. So does this where x and the weights, as released,
        # are bfloat16: such factors are exact, and their products are summed in float32.
        form = "btd,udk->btuk" if self.overlapping else "btd,dk->btk"
        values, gates = (
            project(form, x, w, self.runtime, preferred_element_type=jnp.float32)
            for w in (w_kv, w_gate)
        )
        if earlier is None:
            return self._entries(values, gates, bias, norm, layout, at, x.dtype), None
        kept = keep_pending(values, gates, earlier)
        values, gates, layout, at = self._with_earlier(values, gates, layout, at, earlier)
        # How many tokens are read at once depends on the batch; the bits of a row must not.
        entries = self._entries(
            values, gates, bias, norm, layout, at, x.dtype,
            worthwhile=not self.runtime.batch_invariant,
        )
        return entries[:, 1:] if self.overlapping else entries, kept

    def _entries(
        self, values, gates, bias, norm, layout: EntryLayout, at: Rotation, dtype, *,
        worthwhile: bool = True,
    ) -> Entries:
        """Return the entries of a layout; `worthwhile` is that of `compressor.choose_for`."""
        kernel = compressor.choose_for(
            at.cos.shape[1], dtype, self.runtime.implementation("compressor"),
            worthwhile=worthwhile,
        )
        if kernel != XLA:
            return compressor.compress(
                values, gates, bias, norm, *at, layout.start, layout.has_previous,
                eps=self.config.rms_norm_eps, dtype=dtype, rounded=self.rounded,
                implementation=kernel,
            )
        values = take_blocks(values, layout, self.ratio)
        gates = take_blocks(gates, layout, self.ratio) + bias
        if self.overlapping:
            values, gates = overlap(values, layout, 0.0), overlap(gates, layout, -jnp.inf)
        entries = rms_norm(pool(values, gates), norm, eps=self.config.rms_norm_eps)
        entries = rotate(entries.astype(dtype), at)
        return round_entry(entries, self.config) if self.rounded else entries

    def _with_earlier(self, values, gates, layout: EntryLayout, at: Rotation, earlier):
        """Put earlier tokens before the new ones, so that blocks lie in one row.

        An overlapping compressor gets the block before the first as an entry, which is not wanted.
        """
        pending, layer, span = earlier
        values, gates = (
            after_ring(ring[layer], new, span.start)
            for ring, new in zip(pending, (values, gates), strict=True)
        )
        start = layout.start - span.start[:, None] + pending.values.shape[2]
        has_previous = layout.has_previous
        if self.overlapping:
            start = jnp.concatenate([start[:, :1] - self.ratio, start], axis=1)
            has_previous = jnp.pad(has_previous, ((0, 0), (1, 0)))
            at = Rotation(*(jnp.pad(x, ((0, 0), (1, 0), (0, 0))) for x in at))
        # The last blocks may lack tokens: what they are read as is not kept.
        start = jnp.minimum(start, values.shape[1] - self.ratio)
        return values, gates, layout._replace(start=start, has_previous=has_previous), at
