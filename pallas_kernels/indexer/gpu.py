"""The indexer on GPU: each program scores one query's entries and keeps the best of them.

Scores go to a row of their program's, which is used again for the next query and stays in the
second-level cache. From there a program takes all of a round into its registers, finds the least
score that is kept bit by bit, by counting, and moves what is kept to the front.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.blocks import pad_axes, power_of_two
from pallas_kernels.indexer.index import Programs, Rounds
from pallas_kernels.indexer.order import NONE, sortable, threshold, to_bfloat16
from pallas_kernels.target import GPU, target_platform


class Tiles(NamedTuple):
    """How the work is cut up."""

    slots: int  # scores of a round, the best so far included, at most
    entries: int  # scored at once
    warps: int
    stages: int  # tiles whose loads are under way


TILES = Tiles(8192, 128, 8, 3)
PROGRAMS = 264  # two for each of an H100's multiprocessors


class Row(NamedTuple):
    """A program's row of scores, and of numbers, which are those of the best so far."""

    scores: Float[Array, " slots"]
    best: Int[Array, " slots"]


def select(
    queries: Float[Array, "b t i j"], head_weights: Float[Array, "b t i"],
    keys: Float[Array, "b c j"], first: Int[Array, "b t"], end: Int[Array, "b t"], topk: int, *,
    rounded: bool = False,
) -> Int[Array, "b t l"]:
    """Compute `reference.select`."""
    b, t, heads, width = queries.shape
    rounds, heads, width = rounds_for(topk, keys.shape[1]), power_of_two(heads), power_of_two(width)
    share = Programs(t, max(PROGRAMS // b, 1))
    operands = (
        pad_axes(queries, {2: heads, 3: width}), pad_axes(head_weights, {2: heads}),
        pad_axes(keys, {2: width}), first, end,
    )

    def kernel(q_ref, weights_ref, keys_ref, first_ref, end_ref, out_ref, *row_refs):
        program, row = pl.program_id(0), Row(*row_refs)

        def query(n, done):
            at = share.token(program, n)
            seen = first_ref[at], end_ref[at]
            q, weights = q_ref[at], weights_ref[at].astype(jnp.float32)

            def hits_of(entries):
                return plgpu.dot(q, keys_ref[entries, :], trans_b=True)

            held = best_of_range(hits_of, weights, rounds, topk, seen, row, rounded=rounded)
            place = jnp.arange(rounds.topk)
            out_ref[at] = jnp.where(place < held, row.best[pl.ds(0, rounds.topk)], -1)
            return done + 1

        jax.lax.fori_loop(0, share.length(program), query, jnp.int32(0))

    shapes = (
        jax.ShapeDtypeStruct((b, t, rounds.topk), jnp.int32),
        jax.ShapeDtypeStruct((b, share.count, rounds.slots), jnp.float32),
        jax.ShapeDtypeStruct((b, share.count, rounds.slots), jnp.int32),
    )
    row = pl.BlockSpec((None, None, rounds.slots), lambda i, b: (b, i, 0))
    chosen, *_ = pl.pallas_call(
        kernel,
        grid=(share.count, b),
        in_specs=[_of_row(x) for x in operands],
        out_specs=[_of_row(shapes[0]), row, row],
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=TILES.warps, num_stages=TILES.stages),
        interpret=target_platform() != GPU,
        name="select_entries",
    )(*operands)
    return chosen[:, :, :topk]


def rounds_for(topk: int, entries: int) -> Rounds:
    """Return the rounds for so many entries: few need fewer slots."""
    kept = power_of_two(topk)
    slots = min(max(TILES.slots, 2 * kept), power_of_two(kept + entries))
    return Rounds(kept, max(slots, 2 * kept), min(TILES.entries, kept))


def best_of_range(
    hits_of: Callable, weights: Float[Array, " i"], rounds: Rounds, topk: int, seen: tuple,
    row: Row, *, rounded: bool,
) -> Int[Array, ""]:
    """Put the best entries of a range to the front of a row, by number; return how many.

    Args:
      hits_of: from numbers of entries to their keys' products with the query's heads.
      seen: the first entry and the end.
      rounded: compare scores rounded to bfloat16.
    """

    def score(entries):
        found = jnp.sum(jnp.maximum(hits_of(entries), 0.0) * weights[:, None], axis=0)
        return to_bfloat16(found) if rounded else found

    def one_round(number, held):
        _score(score, rounds, number, seen, row)
        return _keep_best(rounds, topk, number, seen, held, row)

    return jax.lax.fori_loop(0, rounds.count(*seen), one_round, jnp.int32(0))


def _score(score: Callable, rounds: Rounds, number, seen, row: Row) -> None:
    """Score the entries of a round."""

    def score_tile(i, done):
        slot = rounds.slot(i, jnp.arange(rounds.tile))
        entry = rounds.entry(seen[0], number, slot)
        part = pl.ds(rounds.slot(i, 0), rounds.tile)
        row.scores[part] = score(rounds.row(entry, seen[1]))
        return done + 1

    jax.lax.fori_loop(0, rounds.tiles(*seen, number), score_tile, jnp.int32(0))
    _barrier()


def _keep_best(rounds: Rounds, topk: int, number, seen, held, row: Row):
    """Move the best of a round to the front, in the order of their numbers; return how many."""
    slot, found = jnp.arange(rounds.slots), row.scores[...]
    entry = rounds.entry(seen[0], number, slot)
    entry = jnp.where(slot < rounds.topk, row.best[...], entry)
    exists = (slot < held) | rounds.exists(*seen, number, slot)
    taken, place = best_places(found, exists, topk)
    _barrier()
    plgpu.store(row.best.at[place], entry, mask=taken)
    plgpu.store(row.scores.at[place], found, mask=taken)
    _barrier()
    return _count(taken)


def best_places(
    found: Float[Array, " slots"], exists: Bool[Array, " slots"], topk: int
) -> tuple[Bool[Array, " slots"], Int[Array, " slots"]]:
    """Return which scores are the best, of equal ones the first, and places that move them ahead.

    What is not among them gets the places behind, so that all places differ.
    """
    order = jnp.where(exists, sortable(found), NONE)
    least = threshold(lambda x: _count(order >= x), topk, jnp.int32(0))
    above, equal = order > least, (order == least) & exists
    taken = above | (equal & (_places(equal) < topk - _count(above)))
    return taken, jnp.where(taken, _places(taken), _count(taken) + _places(~taken))


def _count(condition: Array) -> Int[Array, ""]:
    return jnp.sum(condition.astype(jnp.int32))


def _places(condition: Array) -> Int[Array, " slots"]:
    """Return how many before each hold the condition, for those that do."""
    return jnp.cumsum(condition.astype(jnp.int32)) - 1


def _barrier() -> None:
    """Wait for the program's other threads, whose part of the row is read next."""
    if target_platform() == GPU:
        plgpu.debug_barrier()


def _of_row(x) -> pl.BlockSpec:
    rest = x.shape[1:]
    return pl.BlockSpec((None, *rest), lambda i, b: (b, *(0 for _ in rest)))
