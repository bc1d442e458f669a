"""Pooling on TPU: the tokens of a block of entries, 128 channels of a series at a time."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.compressor.tpu_fitted import LANES, Fitted, Sizes

LARGE, LEAST = 1e30, -1e30  # above and below any gate
UNROLLED = 8  # places of a block whose code is written out


class Pool(NamedTuple):
    """Softmax-weighted sums of the tokens of each entry."""

    largest: Float[Array, "e lanes"]
    total: Float[Array, "e lanes"]
    sums: Float[Array, "e lanes"]

    def moved(self, first: Pool) -> Pool:
        """Move each entry's one on; `first` is the first entry's."""
        return Pool(*(_next_rows(x, row) for x, row in zip(self, first, strict=True)))

    def where(self, there: Array) -> Pool:
        """Empty those of entries that are not there."""
        fills = LEAST, 0.0, 0.0
        return Pool(*(jnp.where(there, x, fill) for x, fill in zip(self, fills, strict=True)))

    def joined(self, other: Pool) -> Pool:
        """Return the pool of the tokens of both."""
        largest = jnp.maximum(self.largest, other.largest)
        mine, others = jnp.exp(self.largest - largest), jnp.exp(other.largest - largest)
        return Pool(
            largest, mine * self.total + others * other.total,
            mine * self.sums + others * other.sums,
        )


class Tile(NamedTuple):
    """The tokens of a block of entries.

    Tokens of the same place in their blocks are apart by a stride of rows. Such rows can be loaded
    from arrays of 128 lanes: tokens are copied into them.
    """

    x: Fitted
    before: tuple  # tokens before: values and gates of series 0
    sizes: Sizes
    values: Float[Array, "tokens lanes"]  # of 128 channels of a series
    gates: Float[Array, "tokens lanes"]

    def load(self, u: int, lane: Int[Array, ""]) -> None:
        """Copy 128 channels of a series; add the bias to the gates."""
        columns = lanes(u * (self.sizes.lanes // LANES) + lane)
        self.values[...] = self.x.values[:, columns]
        gates = self._pieces(self.x.gates[:, columns]) + self.x.bias[u, :, lanes(lane)]
        self.gates[...] = gates.reshape(self.gates.shape)

    def pool(self, lane: Int[Array, ""]) -> Pool:
        """Pool 128 channels of all entries."""
        rows = self.sizes.rows
        if self.sizes.series == 1:
            return self._pool_series(0, lane)
        place = pl.ds(rows.tokens_before - rows.ratio, rows.ratio)
        values, gates = (ref[place, lanes(lane)] for ref in self.before)
        gates = gates + self.x.bias[0, pl.ds(0, rows.ratio), lanes(lane)]
        largest = jnp.max(gates, axis=0, keepdims=True)
        weights = jnp.exp(gates - largest)
        first = Pool(
            largest, jnp.sum(weights, axis=0, keepdims=True),
            jnp.sum(weights * values, axis=0, keepdims=True),
        )
        previous = self._pool_series(0, lane).moved(first).where(self.x.previous[...] > 0)
        return previous.joined(self._pool_series(1, lane))

    def _pool_series(self, u: int, lane: Int[Array, ""]) -> Pool:
        self.load(u, lane)
        zeros = jnp.zeros((self.sizes.rows.entries, LANES), jnp.float32)
        largest = self._loop(
            lambda j, most: jnp.maximum(most, self.gates[self._at(j), :]), zeros + LEAST
        )

        def add(j, sums):
            total, weighed = sums
            weight = jnp.exp(self.gates[self._at(j), :] - largest)
            return total + weight, weighed + weight * self.values[self._at(j), :]

        return Pool(largest, *self._loop(add, (zeros, zeros)))

    def pass_back(
        self, u: int, lane: Int[Array, ""], largest: Float[Array, "e lanes"],
        share: Float[Array, "e lanes"], average: Float[Array, "e lanes"], grad_bias,
    ) -> None:
        """Replace 128 channels' values and gates by their gradients.

        Args:
          share: the gradient of the average, divided by the softmax's denominator.
          grad_bias: added to.
        """
        self.load(u, lane)

        def step(j, carry):
            value = self.values[self._at(j), :]
            weight = jnp.exp(self.gates[self._at(j), :] - largest) * share
            self.values[self._at(j), :] = weight
            self.gates[self._at(j), :] = weight * (value - average)
            return carry

        self._loop(step, 0)
        grad_bias[u, :, lanes(lane)] += jnp.sum(self._pieces(self.gates[...]), axis=0)

    def _at(self, j) -> pl.Slice:
        """Return the rows of the tokens at place j of each block."""
        rows = self.sizes.rows
        return pl.ds(j, rows.entries, stride=rows.ratio)

    def _pieces(self, x: Float[Array, "tokens lanes"]) -> Float[Array, "n rows lanes"]:
        """Cut into pieces of whole tiles and whole blocks."""
        return x.reshape(-1, self.sizes.rows.tokens_before, LANES)

    def _loop(self, step, start):
        """Apply `step` to the places of a block, one after another."""
        ratio = self.sizes.rows.ratio
        return jax.lax.fori_loop(0, ratio, step, start, unroll=ratio <= UNROLLED)


def lanes(tile) -> pl.Slice:
    """Return the lanes of a register's width."""
    return pl.ds(pl.multiple_of(tile * LANES, LANES), LANES)


def earlier_rows(x: Float[Array, "e k"], last: Float[Array, "1 k"]) -> Float[Array, "e k"]:
    """Move rows one up, above a new last one."""
    rows = x.shape[0]
    return jnp.where(indices(x, 0) == rows - 1, last, pltpu.roll(x, rows - 1, 0))


def _next_rows(x: Float[Array, "e k"], first: Float[Array, "1 k"]) -> Float[Array, "e k"]:
    """Move rows one down, under a new first one."""
    return jnp.where(indices(x, 0) == 0, first, pltpu.roll(x, 1, 0))


def indices(x: Array, axis: int) -> Int[Array, "e k"]:
    """Return each number's index along an axis."""
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)


def swapped(x: Float[Array, "e k"]) -> Float[Array, "e k"]:
    """Exchange the two channels of each pair."""
    even = indices(x, 1) & 1 == 0
    return jnp.where(even, pltpu.roll(x, x.shape[1] - 1, 1), pltpu.roll(x, 1, 1))


def inverse_rms(average: Float[Array, "e k"], width: int, eps: float) -> Float[Array, "e 1"]:
    """Return what normalises entries, whose lanes past the width are 0."""
    return jax.lax.rsqrt(jnp.sum(average * average, axis=1, keepdims=True) / width + eps)
