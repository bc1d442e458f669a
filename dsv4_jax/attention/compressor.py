"""Compress blocks of tokens into single entries by gated pooling."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv4_jax.attention.layout import EntryLayout, blocks_touched
from dsv4_jax.cache import Pending, Span, write_ring
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
    return _join_series(before, blocks[:, :, :, 1], layout, fill)


def _join_series(before: Array, own: Array, layout: EntryLayout, fill: float) -> Array:
    if layout.has_previous is not None:
        before = jnp.where(layout.has_previous[..., None, None], before, fill)
    return jnp.concatenate([before, own], axis=2)


def open_blocks(
    ring: Float[Array, "b s *rest"], new: Float[Array, "b t *rest"], start: Int[Array, " b"],
    ratio: int, count: int, before: int,
) -> Array:
    """Return the blocks that new tokens may complete, [b, before + count, ratio, ...].

    Args:
      ring: what is kept of earlier tokens, at their position modulo the slots.
      start: position of the first new token; its block is the first of `count`.
      before: blocks wanted in front of it; where a row has none, their content is arbitrary.
    """
    slots, t = ring.shape[1], new.shape[1]
    first = (start // ratio - before) * ratio
    position = first[:, None] + jnp.arange((before + count) * ratio)
    start = start[:, None]
    slot = jnp.where(position < start, position % slots, slots + position - start)
    joined = jnp.concatenate([ring, new], axis=1)
    rows = jax.vmap(lambda row, i: row[i])(joined, jnp.minimum(slot, slots + t - 1))
    return rows.reshape(rows.shape[0], before + count, ratio, *rows.shape[2:])


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
        kernel = XLA  # with a cache: a kernel would fill up one token to a block of entries
        if earlier is None:
            kernel = compressor.choose_for(
                x.shape[1] // self.ratio, x.dtype, self.runtime.implementation("compressor")
            )
        if kernel != XLA:
            entries = compressor.compress(
                values, gates, bias, norm, *at, layout.start, layout.has_previous,
                eps=self.config.rms_norm_eps, dtype=x.dtype, rounded=self.rounded,
                implementation=kernel,
            )
            return entries, None
        if earlier is None:
            pending = None
            values = take_blocks(values, layout, self.ratio)
            gates = take_blocks(gates, layout, self.ratio) + bias
            if self.overlapping:
                values, gates = overlap(values, layout, 0.0), overlap(gates, layout, -jnp.inf)
        else:
            values, gates, pending = self._with_earlier(values, gates, bias, layout, earlier)
        entries = rms_norm(pool(values, gates), norm, eps=self.config.rms_norm_eps)
        entries = rotate(entries.astype(x.dtype), at)
        return round_entry(entries, self.config) if self.rounded else entries, pending

    def _with_earlier(self, values, gates, bias, layout: EntryLayout, earlier: EarlierTokens):
        """Complete blocks that earlier tokens began; return blocks and what is pending now."""
        pending, layer, span = earlier
        position = span.start[:, None] + jnp.arange(values.shape[1])
        gates = gates + bias[position % self.ratio]
        count, before = blocks_touched(values.shape[1], self.ratio), int(self.overlapping)

        def blocks(ring, new, fill):
            taken = open_blocks(ring[layer], new, span.start, self.ratio, count, before)
            if not self.overlapping:
                return taken
            return _join_series(taken[:, :-1, :, 0], taken[:, 1:, :, 1], layout, fill)

        kept = Pending(
            write_ring(pending.values, layer, values, span),
            write_ring(pending.gates, layer, gates, span),
        )
        values = blocks(pending.values, values, 0.0)
        return values, blocks(pending.gates, gates, -jnp.inf), kept
