"""The indexer over a cache on GPU: a query's entries are shared by several programs.

At a step of generation there are few queries, of many entries each. Every part of a query's entries
has a program that keeps its best; programs that each take the best of several parts follow, until
one is left. Keys are decoded in registers, tile by tile.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.blocks import pad_axes, power_of_two
from pallas_kernels.codes import BYTES, GROUP, halves, powers
from pallas_kernels.index_math import cdiv
from pallas_kernels.indexer import gpu
from pallas_kernels.indexer.index import Merge, Packed
from pallas_kernels.indexer.keys import is_packed
from pallas_kernels.sparse_attention.index import Split
from pallas_kernels.target import GPU, target_platform

LEAST = 16  # channels of a product on tensor cores
ADDRESSED = 2**31  # elements that signed offsets of 32 bits reach
MOST_ROWS = 2**16 - 1  # an axis of a grid
WIDE = 2**32  # bytes from which on Pallas makes offsets of 64 bits
# What `fits` takes.
LIMITS = (
    f"{MOST_ROWS} rows, a power of two of at least {LEAST} channels ({GROUP} packed) and a single "
    "layer not to have 2^31 to 2^32 bytes packed"
)


class Best(NamedTuple):
    """The best entries of each part of a query's, -1 where there are fewer, and their scores."""

    scores: Float[Array, "b t parts l"]
    numbers: Int[Array, "b t parts l"]


def select_stored(
    queries: Float[Array, "b t i j"], head_weights: Float[Array, "b t i"], stored: Array,
    layer: Int[Array, ""], end: Int[Array, "b t"], topk: int,
) -> Int[Array, "b t l"]:
    """Compute `reference.select_stored`."""
    parts = parts_for(end.size, stored.shape[2], topk)
    best = _best_of_parts(queries, head_weights, *_addressed(stored, layer), end, topk, parts)
    while best.numbers.shape[2] > 1:
        best = _merged(best, topk)
    return best.numbers[:, :, 0, :topk]


def fits(channels: int, stored: Array) -> bool:
    """Say whether the kernels take a cache of keys of so many channels."""
    least = GROUP if is_packed(stored) else LEAST
    power = channels & (channels - 1) == 0
    reached = stored.shape[0] > 1 or not _out_of_reach(stored.size, stored.dtype.itemsize)
    return channels >= least and power and reached and stored.shape[1] <= MOST_ROWS


def _out_of_reach(size: int, bytes_each: int) -> bool:
    """Say whether offsets of 32 bits do not reach all of an array, but have to."""
    return ADDRESSED < size <= WIDE // bytes_each


def _addressed(stored: Array, layer: Int[Array, ""]) -> tuple[Array, Int[Array, ""]]:
    """Return the cache, or the layer alone where the kernel could not address all of it."""
    if not _out_of_reach(stored.size, stored.dtype.itemsize):
        return stored, layer
    return jax.lax.dynamic_slice_in_dim(stored, layer, 1), jnp.zeros_like(layer)


def parts_for(queries: int, entries: int, topk: int) -> int:
    """Return how many parts a query's entries are cut into: a power of two.

    As many as give every multiprocessor work, but none so short that it has nothing to leave out.
    """
    most = min(gpu.PROGRAMS // queries, cdiv(entries, 2 * power_of_two(topk)))
    return 1 << max(most, 1).bit_length() - 1


def merged_at_once(parts: int, length: int) -> int:
    """Return of how many parts a program takes the best, of so many numbers each."""
    return min(max(gpu.TILES.slots // length, 2), parts)


def _best_of_parts(
    queries, head_weights, stored: Array, layer, end, topk: int, parts: int
) -> Best:
    packed = is_packed(stored)
    heads = power_of_two(queries.shape[2])
    pieces = _pieces(pad_axes(queries, {2: heads}), packed)
    weights = pad_axes(head_weights.astype(jnp.float32), {2: heads})
    rounds = gpu.rounds_for(topk, cdiv(stored.shape[2], parts))

    def kernel(q_ref, weights_ref, stored_ref, layer_ref, end_ref, scores_ref, numbers_ref):
        row, layer = pl.program_id(2), layer_ref[0]
        load = _load_packed if packed else _load_plain

        def hits_of(entries):
            keys = load(stored_ref, layer, row, entries, q_ref.dtype)
            return sum(plgpu.dot(q_ref[n], part, trans_b=True) for n, part in enumerate(keys))

        seen = Split(parts).piece(jnp.int32(0), end_ref[...], pl.program_id(0))
        best = gpu.Row(scores_ref, numbers_ref)
        held = gpu.best_of_range(
            hits_of, weights_ref[...], rounds, topk, seen, best, rounded=packed
        )
        front = pl.ds(0, rounds.topk)
        numbers_ref[front] = jnp.where(jnp.arange(rounds.topk) < held, numbers_ref[front], -1)

    b, t = end.shape
    one = pl.BlockSpec((None, None, None, rounds.slots), lambda p, i, b: (b, i, p, 0))
    shape = (b, t, parts, rounds.slots)
    best = pl.pallas_call(
        kernel,
        grid=(parts, t, b),
        in_specs=[
            _of_query(pieces), _of_query(weights),
            pl.BlockSpec(stored.shape, lambda p, i, b: (0, 0, 0, 0)),
            pl.BlockSpec((1,), lambda p, i, b: (0,)), _of_query(end),
        ],
        out_specs=[one, one],
        out_shape=[jax.ShapeDtypeStruct(shape, x) for x in (jnp.float32, jnp.int32)],
        compiler_params=_params(),
        interpret=target_platform() != GPU,
        name="select_stored",
    )(pieces, weights, stored, layer.reshape(1), end)
    return Best(*(x[..., : rounds.topk] for x in best))


def _pieces(queries: Float[Array, "b t i j"], packed: bool) -> Float[Array, "b t n i l"]:
    """Cut queries as keys are loaded: even channels and odd ones, or all at once."""
    if not packed:
        return queries[:, :, None]
    return jnp.stack([queries[..., ::2], queries[..., 1::2]], axis=2)


def _load_plain(stored_ref, layer, row, entries, dtype) -> tuple[Float[Array, "s j"]]:
    return (stored_ref[layer, row, entries, :].astype(dtype),)


def _load_packed(stored_ref, layer, row, entries, dtype) -> tuple[Float[Array, "s l"], ...]:
    """Return the even and the odd channels of keys."""
    packed = Packed(stored_ref.shape[3] // (BYTES + 1), BYTES)
    group = jnp.arange(packed.groups)
    byte = packed.code(group[:, None], jnp.arange(BYTES)[None, :])
    codes = stored_ref[layer, row, entries[:, None, None], byte[None]].astype(jnp.int32)
    scales = stored_ref[layer, row, entries[:, None], packed.scale(group)[None]]
    scales = powers(scales)[:, :, None]
    return tuple(
        (half * scales).astype(dtype).reshape(entries.size, packed.groups * BYTES)
        for half in halves(codes)
    )


def _merged(best: Best, topk: int) -> Best:
    """Take the best of several parts each, whose entries have ascending numbers."""
    b, t, parts, length = best.numbers.shape
    merge = Merge(parts, merged_at_once(parts, length))

    def kernel(scores_ref, numbers_ref, out_scores_ref, out_numbers_ref):
        found, number = scores_ref[...].reshape(-1), numbers_ref[...].reshape(-1)
        taken, place = gpu.best_places(found, number >= 0, topk)
        kept = place < length
        plgpu.store(out_scores_ref.at[place], found, mask=kept)
        plgpu.store(out_numbers_ref.at[place], jnp.where(taken, number, -1), mask=kept)

    several = pl.BlockSpec((None, None, merge.size, length), lambda g, i, b: (b, i, g, 0))
    one = pl.BlockSpec((None, None, None, length), lambda g, i, b: (b, i, g, 0))
    shape = (b, t, merge.groups, length)
    return Best(*pl.pallas_call(
        kernel,
        grid=(merge.groups, t, b),
        in_specs=[several, several],
        out_specs=[one, one],
        out_shape=[jax.ShapeDtypeStruct(shape, x) for x in (jnp.float32, jnp.int32)],
        compiler_params=_params(),
        interpret=target_platform() != GPU,
        name="merge_best",
    )(*best))


def _params() -> plgpu.CompilerParams:
    return plgpu.CompilerParams(num_warps=gpu.TILES.warps, num_stages=gpu.TILES.stages)


def _of_query(x: Array) -> pl.BlockSpec:
    rest = x.shape[2:]
    return pl.BlockSpec((None, None, *rest), lambda p, i, b: (b, i, *(0 for _ in rest)))
