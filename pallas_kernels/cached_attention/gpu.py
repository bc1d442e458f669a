"""Cached attention on GPU: programs share the keys of one query, then a second kernel adds up.

The heads of a query are the rows of the matrix products, its keys their columns. Few rows of a
batch are few queries, so that a query's keys are split: each piece leaves its output, maximum and
total, which are added in the order of the pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.blocks import pad_axes, power_of_two
from pallas_kernels.cached_attention.formats import (
    CODES,
    Form,
    Part,
    Parts,
    parts_of,
    words,
)
from pallas_kernels.cached_attention.index import Ring, Split, Tiles, sees_new
from pallas_kernels.codes import powers
from pallas_kernels.index_math import cdiv, div, mod
from pallas_kernels.sparse_attention import gpu_queries
from pallas_kernels.sparse_attention.gpu_queries import LOG2_E, softmax_fold
from pallas_kernels.target import GPU, target_platform

TUNING = gpu_queries.Tiles(64, 32, 8, 2)
PROGRAMS = 264  # two for each of an H100's multiprocessors, to share them evenly
LEAST = 4  # tiles of a piece: what it leaves behind is as large as some seven tiles of FP8
INVARIANT_PARTS = 16
NEW = 32  # rows of the tile of new tokens


class Fitted(NamedTuple):
    """Operands as the kernels take them: a query's channels part by part."""

    q: Float[Array, "n h k"]
    sink: Float[Array, " h"]
    layer: Int[Array, ""]
    start: Int[Array, " b"]
    end: Int[Array, " n"]  # entries, or places of chosen ones
    new: Array  # [b, t, width]
    ring: Array  # [z, b, s, width]
    entries: Array | None
    chosen: Int[Array, "n l"] | None


def forward(
    q: Float[Array, "b t h k"], new, sink, cached, form: Form, invariant: bool
) -> Float[Array, "b t h k"]:
    """Return the output, as `cached_attention` does."""
    b, t, h, k = q.shape
    parts = parts_of(form)
    x = fitted(q, new, sink, cached, form, parts)
    out = attend(x, parts, split_of(x, invariant), scale=k**-0.5)
    return parts.gather(out[:, :h].reshape(b, t, h, -1))


def fitted(q, new, sink, cached, form: Form, parts: Parts) -> Fitted:
    """Lay the operands out; heads are filled up to whole groups, chosen ones to whole tiles."""
    b, t, h, k = q.shape
    heads = min(TUNING.heads, power_of_two(h))
    q = pad_axes(parts.spread(q.reshape(b * t, h, k)), {1: heads})
    sink = pad_axes(sink.astype(jnp.float32), {0: heads})
    entries, chosen, end = cached.entries, cached.chosen, jnp.zeros(b * t, jnp.int32)
    if chosen is not None:
        end = jnp.full(b * t, chosen.shape[2], jnp.int32)
        chosen = pad_axes(chosen.reshape(b * t, -1), {1: TUNING.keys}, fill=-1)
    elif entries is not None:
        end = cached.end.reshape(b * t).astype(jnp.int32)
    return Fitted(
        q, sink, cached.layer, cached.start, end, words(new, form), words(cached.ring, form),
        None if entries is None else words(entries, form), chosen,
    )


def split_of(x: Fitted, invariant: bool) -> Split:
    """Return how a query's tiles are split: by the shapes, or always into as many pieces."""
    queries, heads, _ = x.q.shape
    groups = heads // min(TUNING.heads, heads)
    wanted = INVARIANT_PARTS if invariant else cdiv(PROGRAMS, queries * groups)
    most = 0
    if x.entries is not None:
        most = x.entries.shape[2] if x.chosen is None else x.chosen.shape[1]
    tiles = Tiles(TUNING.keys, x.ring.shape[2]).count(most)
    return Split(min(wanted, cdiv(tiles, LEAST)), LEAST)


def attend(
    x: Fitted, parts: Parts, split: Split, *, scale: float
) -> Float[Array, "n h k"]:
    """Return the output for each query, its channels part by part."""
    n, h, width = x.q.shape
    heads, t = min(TUNING.heads, h), x.new.shape[1]
    tiles = Tiles(TUNING.keys, x.ring.shape[2])
    alone = split.parts == 1

    def kernel(q_ref, sink_ref, layer_ref, start_ref, end_ref, *refs):
        kv_refs, outs = refs[: len(refs) - (1 if alone else 3)], refs[-1 if alone else -3 :]
        query, part = pl.program_id(0), pl.program_id(2)
        q = q_ref[...]
        fold = softmax_fold(q, scale)
        # The sink is part of every softmax, so that it makes a finite first maximum.
        top = sink_ref[...] * LOG2_E
        total = jnp.where(part == 0, jnp.ones_like(top), jnp.zeros_like(top))
        state = top, total, jnp.zeros((heads, width), jnp.float32)
        end = end_ref[query]
        piece = split.piece(tiles.count(end), part)
        where = query, layer_ref[...], start_ref[div(query, t)], end

        def read(ref, *rows):
            return read_rows(ref, rows, parts, q.dtype)

        top, total, out = over_tiles(tiles, piece, where, t, kv_refs, read, fold, state)
        out = out / total[:, None] if alone else out
        outs[0][...] = out.astype(outs[0].dtype)
        if not alone:
            outs[1][...], outs[2][...] = top, total

    numbers = [x.layer, x.start, x.end]
    kv = [y for y in (x.new, x.ring, x.entries, x.chosen) if y is not None]
    rows = pl.BlockSpec((None, heads, width), lambda i, g, p: (i, g, 0))
    out_specs, out_shape = rows, jax.ShapeDtypeStruct(x.q.shape, x.q.dtype)
    if not alone:
        number = pl.BlockSpec((None, None, heads), lambda i, g, p: (p, i, g))
        out_specs = [
            pl.BlockSpec((None, None, heads, width), lambda i, g, p: (p, i, g, 0)), number, number,
        ]
        shapes = [(split.parts, n, h, width), *[(split.parts, n, h)] * 2]
        out_shape = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    found = pl.pallas_call(
        kernel,
        grid=(n, h // heads, split.parts),
        in_specs=[
            rows, pl.BlockSpec((heads,), lambda i, g, p: g),
            *[_whole(y) for y in (*numbers, *kv)],
        ],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=TUNING.warps, num_stages=TUNING.stages),
        interpret=target_platform() != GPU,
        name="attend_cached",
    )(x.q, x.sink, *numbers, *kv)
    return found if alone else combine(*found, x, split, tiles)


def over_tiles(
    tiles: Tiles, piece, where, tokens: int, kv_refs, read: Callable, fold: Callable, state
):
    """Fold a piece of a query's tiles into a state.

    Args:
      where: the query, the layer, the position of the row's first query, the end of entries.
      kv_refs: of the new tokens, the ring and, if there are entries, these and, if given, chosen.
      read: from one of these and leading indices, the last of rows, to key-values.
      fold: takes a state, the key-values of a tile and which of them are seen.
    """
    query, layer, start, end = where
    new_ref, ring_ref, *entry_refs = kv_refs
    row, place, size = div(query, tokens), mod(query, tokens), tiles.tile
    ring = Ring(tiles.slots)

    def ring_tile(i, state):
        slot = tiles.key(i, jnp.arange(size))
        seen = (slot < tiles.slots) & ring.sees(place, slot, start)
        return fold(state, read(ring_ref, layer, row, tiles.row(slot, tiles.slots)), seen)

    def new_tile(_, state):
        token = jnp.arange(NEW)
        kv = read(new_ref, row, jnp.minimum(token, tokens - 1))
        return fold(state, kv, sees_new(place, token))

    def entry_tile(i, state):
        entry = tiles.key(i, jnp.arange(size))
        if len(entry_refs) == 1:
            rows, seen = tiles.row(entry, end), entry < end
        else:
            chosen = entry_refs[1][query, entry]
            rows, seen = jnp.maximum(chosen, 0), chosen >= 0
        return fold(state, read(entry_refs[0], layer, row, rows), seen)

    state = jax.lax.fori_loop(*tiles.ring(*piece), ring_tile, state)
    state = jax.lax.fori_loop(*tiles.new(*piece), new_tile, state)
    if entry_refs:
        state = jax.lax.fori_loop(*tiles.entries(*piece), entry_tile, state)
    return state


def read_rows(ref, rows, parts: Parts, dtype) -> Float[Array, "rows k"]:
    """Read rows as numbers of a dtype, their channels laid out as `Parts`.

    Args:
      rows: leading indices, and then the numbers of the rows.
    """
    *lead, rows = rows
    shape, loaded, place = (rows.shape[0], parts.width), {}, jnp.arange(parts.width)

    def load(part: Part):
        if part.columns not in loaded:
            whole = part.columns.count == parts.width
            columns = part.columns.first + place if whole else part.columns.at(place)
            loaded[part.columns] = ref[(*lead, _grid(rows, 1, shape), _grid(columns, 0, shape))]
        return loaded[part.columns]

    def values(part: Part):
        found = load(part)
        if part.kind == CODES:
            codes = ((found >> part.shift) & 255).astype(jnp.uint8)
            # Exact in bfloat16: codes have four significant bits.
            found = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(dtype)
            scale = ref[(*lead, rows, part.scale)].astype(jnp.int32)
            found *= powers((scale >> part.scale_shift) & 255).astype(dtype)[:, None]
        elif found.dtype == jnp.uint16:
            found = jax.lax.bitcast_convert_type(found, jnp.bfloat16)
        found = found.astype(dtype)
        if part.columns.count < parts.width:
            found = jnp.where(place[None, :] < part.columns.count, found, 0)
        return found

    def join(numbers: list[Array]) -> Array:
        if len(numbers) == 1:
            return numbers[0]
        pair = jnp.stack([join(numbers[0::2]), join(numbers[1::2])], axis=-1)
        return pair.reshape(pair.shape[0], -1)

    empty = [jnp.zeros(shape, dtype)] * (parts.count - len(parts.parts))
    return join([*map(values, parts.parts), *empty])


def _grid(x: Int[Array, " x"], axis: int, shape) -> Int[Array, "rows k"]:
    return jnp.broadcast_to(jnp.expand_dims(x, axis), shape)


def _whole(x: Array) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda i, g, p: (0,) * x.ndim)


def combine(
    out: Float[Array, "p n h k"], top: Float[Array, "p n h"], total: Float[Array, "p n h"],
    x: Fitted, split: Split, tiles: Tiles,
) -> Float[Array, "n h k"]:
    """Add up the pieces of each query; those without a tile are not read."""
    _, n, h, width = out.shape
    heads = min(TUNING.heads, h)

    def kernel(end_ref, sink_ref, out_ref, top_ref, total_ref, result_ref):
        count = tiles.count(end_ref[pl.program_id(0)])
        place = jnp.arange(power_of_two(split.parts))
        used = split.used(count, place) & (place < split.parts)

        def add(i, state):
            top, total, sum_ = state
            new_top = jnp.maximum(top, top_ref[i, :])
            shrink, share = jnp.exp2(top - new_top), jnp.exp2(top_ref[i, :] - new_top)
            sum_ = sum_ * shrink[:, None] + out_ref[i, :, :] * share[:, None]
            return new_top, total * shrink + total_ref[i, :] * share, sum_

        first = sink_ref[...] * LOG2_E
        state = first, jnp.zeros_like(first), jnp.zeros((heads, width), jnp.float32)
        _, total, sum_ = jax.lax.fori_loop(0, jnp.sum(used.astype(jnp.int32)), add, state)
        result_ref[...] = (sum_ / total[:, None]).astype(result_ref.dtype)

    number = pl.BlockSpec((split.parts, None, heads), lambda i, g: (0, i, g))
    return pl.pallas_call(
        kernel,
        grid=(n, h // heads),
        in_specs=[
            pl.BlockSpec((n,), lambda i, g: 0), pl.BlockSpec((heads,), lambda i, g: g),
            pl.BlockSpec((split.parts, None, heads, width), lambda i, g: (0, i, g, 0)),
            number, number,
        ],
        out_specs=pl.BlockSpec((None, heads, width), lambda i, g: (i, g, 0)),
        out_shape=jax.ShapeDtypeStruct((n, h, width), x.q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=TUNING.warps, num_stages=1),
        interpret=target_platform() != GPU,
        name="add_pieces",
    )(x.end, x.sink, out, top, total)
