"""The indexer's loss on GPU: a program for each query, over the entries that it attends to.

All heads of a query are the rows of a matrix product, a tile of entries its columns, summed over
the heads; beside it the same for the indexer's heads and keys. What a query gives to the entries
that it has chosen is kept, a few per cent of its size, so that no gradient needs the first product
again. What it gives to a range of entries is made again in each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.index_loss.gpu_keys import key_gradient
from pallas_kernels.index_loss.gpu_tiles import (
    OfEntries,
    OfQueries,
    Tiles,
    fitted,
    hit_gradient,
    hits_of,
    mass_of,
    over_tiles,
    score_gradient,
)
from pallas_kernels.index_loss.parts import Inputs, Slopes, Sums
from pallas_kernels.index_loss.reference import LOWEST
from pallas_kernels.sparse_attention.index import Bits
from pallas_kernels.sparse_attention.seen import Seen
from pallas_kernels.target import GPU, target_platform

# Rows by number take a stage more: first the numbers are loaded, then the rows.
FORWARD_CHOSEN, FORWARD_RANGE = Tiles(32, 8, 3), Tiles(32, 8, 2)
GRADIENT_CHOSEN, GRADIENT_RANGE = Tiles(32, 4, 3), Tiles(32, 8, 2)
GRADIENT_RANGE_MANY = Tiles(16, 8, 2)  # more than 64 heads fill most of the memory


class _State(NamedTuple):
    """`Sums` as far as a program has come."""

    top: Float[Array, ""]  # of the scores
    norm: Float[Array, ""]  # sum exp(s - top)
    total: Float[Array, ""]
    gap: Float[Array, ""]
    kept: Float[Array, ""]

    def add(self, mass, score, visible, best) -> _State:
        """Add a tile; what is not visible has no mass."""
        top = jnp.maximum(self.top, jnp.max(jnp.where(visible, score, LOWEST)))
        weights = jnp.where(visible, jnp.exp(score - top), 0.0)
        gap = jnp.where(mass > 0, mass * (jnp.log(mass) - score), 0.0)
        return _State(
            top, self.norm * jnp.exp(self.top - top) + jnp.sum(weights),
            self.total + jnp.sum(mass), self.gap + jnp.sum(gap),
            self.kept + jnp.sum(jnp.where(best, mass, 0.0)),
        )


def forward(
    x: Inputs, seen: Seen, best: Seen | None
) -> tuple[Sums, Float[Array, "b t l"] | None]:
    """Return sums over entries and, of chosen ones, the mass of each."""
    tiles = FORWARD_RANGE if seen.chosen is None else FORWARD_CHOSEN
    tile, scale, bits = tiles.entries, x.q.shape[3] ** -0.5, Bits(x.entries.shape[1])
    own, shared = fitted(x, seen, tile, best=best)

    def kernel(own: OfQueries, shared: OfEntries, *out):
        q, log_total = own.q[...], own.log_total[...]
        queries, weights = own.queries[...], own.head_weights[...]
        count, at = over_tiles(own, tile)

        def fold(i, state):
            entry, visible = at(i)
            mass = mass_of(q, log_total, shared.entries[entry, :], scale)
            mass = jnp.where(visible, mass, 0.0)
            hits = hits_of(queries, shared.keys[entry, :])
            if own.chosen is not None:
                out[-1][pl.ds(i * tile, tile)] = mass
            best = jnp.zeros_like(visible)
            if own.words is not None:
                best = (own.words[bits.word(entry)] >> bits.bit(entry)) & 1 == 1
            return state.add(mass, jnp.sum(hits * weights[:, None], axis=0), visible, best)

        zero = jnp.float32(0)
        state = _State(jnp.float32(LOWEST), zero, zero, zero, zero)
        state = jax.lax.fori_loop(0, count, fold, state)
        log_norm = jnp.where(state.norm > 0, state.top + jnp.log(state.norm), 0.0)
        for ref, value in zip(out[:4], (log_norm, *state[2:]), strict=True):
            ref[...] = value

    number = jax.ShapeDtypeStruct(x.q.shape[:2], jnp.float32)
    kept = [] if own.chosen is None else [jax.ShapeDtypeStruct(own.chosen.shape, jnp.float32)]
    found = _call(kernel, tiles, own, shared, [number] * 4 + kept, "index_sums")
    return Sums(*found[:4]), found[4] if kept else None


def gradients(
    x: Inputs, seen: Seen, slopes: Slopes, mass: Float[Array, "b t l"] | None
) -> tuple[Array, Array, Array]:
    """Return the gradients of the indexer's queries, head weights and keys."""
    tiles = GRADIENT_CHOSEN
    if mass is None:
        tiles = GRADIENT_RANGE if x.q.shape[2] <= 64 else GRADIENT_RANGE_MANY
    tile, scale = tiles.entries, x.q.shape[3] ** -0.5
    own, shared = fitted(x, seen, tile, mass=mass, slopes=slopes)

    def kernel(own: OfQueries, shared: OfEntries, queries_out, weights_out):
        queries, weights = own.queries[...], own.head_weights[...]
        slopes = [ref[...] for ref in own.slopes]
        if own.mass is None:
            q, log_total = own.q[...], own.log_total[...]
        count, at = over_tiles(own, tile)

        def fold(i, state):
            entry, visible = at(i)
            keys = shared.keys[entry, :]
            if own.mass is None:
                mass = mass_of(q, log_total, shared.entries[entry, :], scale)
            else:
                mass = own.mass[pl.ds(i * tile, tile)]
            hits = hits_of(queries, keys)
            grad = score_gradient(hits, weights, mass, visible, slopes)
            error = hit_gradient(hits, weights, grad).astype(keys.dtype)
            return state[0] + plgpu.dot(error, keys), state[1] + jnp.sum(hits * grad, axis=1)

        state = jnp.zeros(queries.shape, jnp.float32), jnp.zeros(weights.shape, jnp.float32)
        state = jax.lax.fori_loop(0, count, fold, state)
        queries_out[...] = state[0].astype(queries_out.dtype)
        weights_out[...] = state[1]

    shapes = [jax.ShapeDtypeStruct(y.shape, y.dtype) for y in (own.queries, own.head_weights)]
    grad_queries, grad_weights = _call(
        kernel, tiles, own, shared, shapes, "index_query_gradient"
    )
    i, j = x.queries.shape[2:]
    return (
        grad_queries[:, :, :i, :j], grad_weights[:, :, :i].astype(x.head_weights.dtype),
        key_gradient(x, seen, slopes, mass),
    )


def _call(
    kernel: Callable, tiles: Tiles, own: OfQueries, shared: OfEntries, outputs: list, name: str
) -> list[Array]:
    """Run a kernel for each query."""

    def of_query(x):
        rest = x.shape[2:]
        return pl.BlockSpec((None, None, *rest), lambda i, b: (b, i, *(0 for _ in rest)))

    def of_row(x):
        return pl.BlockSpec((None, *x.shape[1:]), lambda i, b: (b, 0, 0))

    b, t = own.queries.shape[:2]
    return pl.pallas_call(
        kernel,
        grid=(t, b),
        in_specs=[jax.tree.map(of_query, own), jax.tree.map(of_row, shared)],
        out_specs=[of_query(x) for x in outputs],
        out_shape=outputs,
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=target_platform() != GPU,
        name=name,
    )(own, shared)
