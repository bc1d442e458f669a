"""The attention core: one softmax over a query's window, its compressed entries and the sink.

No array of [tokens, tokens] or [tokens, entries] size exists: queries are taken in blocks of the
window's length, each block against its own and the preceding block of keys, and blocks are taken
in chunks whose logits fit a budget. Chunks are recomputed in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.attention.layout import EntryLayout, window_mask
from dsv4_jax.attention.lesson import Lesson
from dsv4_jax.chunks import map_chunks
from dsv4_jax.shapes import Array, Bool, Entries, Float, Int, Keys, Queries, Tokens

# Stretches of a row that see different numbers of entries: each is processed with only as many
# entries as its last query sees, which saves 3/8 of the rectangle above the diagonal.
CAUSAL_STRETCHES = 4


class Compressed(NamedTuple):
    """The compressed entries that a block of queries may see.

    Either one set for all queries (entries [b, c, k], mask [b, z, q, c]) or each query's own
    (entries [b, z, q, l, k], mask [b, z, q, l]).
    """

    entries: Float[Array, "..."]
    mask: Bool[Array, "b z q c"]
    scores: Float[Array, "b z q c"] | None = None  # of an indexer that is to learn from them


class Folded(NamedTuple):
    """The softmax over entries that were taken in tiles, not yet divided by its total."""

    top: Float[Array, "b z q h"]  # subtracted from the logits
    total: Float[Array, "b z q h"]
    out: Float[Array, "b z q h k"]


class Earlier(NamedTuple):
    """The keys of tokens that an earlier call has read."""

    keys: Float[Array, "b w k"]  # w: at least the window
    positions: Int[Array, "b w"]  # in any order; negative where there is no token
    start: Int[Array, " b"]  # position of the first query


class QueryBlocks(NamedTuple):
    """What belongs to queries, each leaf [b, z, q, ...] in blocks of q tokens."""

    q: Float[Array, "b z q h k"]
    keys: Float[Array, "b z s k"]  # of the block and of what comes before it
    at_query: Int[Array, "b z q"]  # positions in the row
    at_key: Int[Array, "b z s"]  # negative where there is no token
    segments: tuple[Array, Array] | None  # document of each query and of each of its key slots
    visible: tuple[Array, Array] | None  # range of compressed entries, first and end
    extra: tuple  # what the choice of entries needs per query


# From queries to the compressed entries that they attend to.
Choose = Callable[[QueryBlocks], Compressed | Folded]

# From entries with scores, and the attention that each gets, to what there is to learn of them.
Teach = Callable[[Compressed, Float[Array, "b z q c"]], Lesson]


def attend_window(
    q: Queries, keys: Keys, sink: Float[Array, " h"], *, window: int,
    segment_ids: Tokens | None = None, earlier: Earlier | None = None,
) -> Queries:
    """Attend each query to the last `window` tokens of its document, itself included."""
    blocks = _to_blocks(q, keys, window, segment_ids, None, (), earlier)
    rows = q.shape[0] if earlier is None else 1
    return _from_blocks(_attend_blocks(blocks, sink, window, None, 0, rows)[0], q.shape[1])


def attend_hybrid(
    q: Queries,
    keys: Keys,
    entries: Entries,
    sink: Float[Array, " h"],
    *,
    window: int,
    ratio: int,
    layout: EntryLayout,
    segment_ids: Tokens | None,
    choose: Callable[[tuple, Entries, Bool[Array, "b z q c"]], Compressed],
    extra: tuple = (),
    teach: Teach | None = None,
) -> tuple[Queries, Lesson | None]:
    """Attend each query to its window and to the compressed entries that `choose` picks for it.

    Args:
      ratio: tokens per entry.
      choose: from (extra of the queries, entries, mask of the visible ones) to `Compressed`.
      extra: arrays [b, t, ...] that `choose` needs, passed to it block by block.
      teach: what an indexer learns of the chosen entries, whose scores `choose` then returns.
    """
    t = q.shape[1]
    blocks = _to_blocks(q, keys, window, segment_ids, layout, extra, None)
    z, block = blocks.q.shape[1:3]
    outs = []
    for begin, end in _stretches(z, entries.shape[1], block):
        stretch = jax.tree.map(lambda x, a=begin, z=end: x[:, a:z], blocks)
        # Entries are numbered by their last token: none beyond this is complete, in any document.
        seen = entries[:, : end * block // ratio]

        def choose_seen(chunk: QueryBlocks, seen=seen) -> Compressed:
            return choose(chunk.extra, seen, _visible_mask(chunk, seen.shape[1]))

        outs.append(
            _attend_blocks(stretch, sink, window, choose_seen, seen.shape[1], q.shape[0], teach)
        )
    return jax.tree.map(lambda *xs: _from_blocks(jnp.concatenate(xs, axis=1), t), *outs)


def attend_cached(
    q: Queries, keys: Keys, sink: Float[Array, " h"], *, window: int, layout: EntryLayout,
    earlier: Earlier, choose: Choose, slots: int, extra: tuple = (),
) -> Queries:
    """Attend each query to its window, earlier keys included, and to stored entries.

    Args:
      choose: from blocks of queries to the entries that they attend to.
      slots: entries per query that `choose` brings into memory at once.
      extra: arrays [b, t, ...] that `choose` needs, passed to it in `QueryBlocks.extra`.
    """
    blocks = _to_blocks(q, keys, window, None, layout, extra, earlier)
    return _from_blocks(_attend_blocks(blocks, sink, window, choose, slots, 1)[0], q.shape[1])


def all_visible(extra: tuple, entries: Entries, mask: Bool[Array, "b z q c"]) -> Compressed:
    """Choose every visible entry: HCA, and CSA before its indexer is brought in."""
    return Compressed(entries, mask)


def fold_entries(
    chunk: QueryBlocks, sink: Float[Array, " h"], read: Callable[[Array], Entries],
    tiles: Int[Array, ""] | int,
) -> Folded:
    """Attend queries to all their visible entries, tile by tile.

    Args:
      read: from the number of a tile to its entries, every tile of one size.
      tiles: how many to take, as an array, or the int 1. Further ones, of which nothing is
        visible, would change no bit.
    """
    q = chunk.q
    scale = q.shape[-1] ** -0.5
    first, end = (x[..., None] for x in chunk.visible)

    def add_tile(tile, state: Folded) -> Folded:
        entries = read(tile)
        number = tile * entries.shape[1] + jnp.arange(entries.shape[1])
        seen = (number >= first) & (number < end)
        logits = _product("bzqhk,bck->bzqhc", q, entries) * scale
        logits = jnp.where(seen[..., None, :], logits, -jnp.inf)
        top = jnp.maximum(state.top, jnp.max(logits, axis=-1))
        shrink, weights = jnp.exp(state.top - top), jnp.exp(logits - top[..., None])
        out = _product("bzqhc,bck->bzqhk", weights.astype(q.dtype), entries)
        return Folded(
            top, state.total * shrink + jnp.sum(weights, axis=-1),
            state.out * shrink[..., None] + out,
        )

    # The sink is part of every softmax, so that it makes a finite first maximum.
    top = jnp.broadcast_to(sink, q.shape[:-1])
    state = Folded(top, jnp.zeros_like(top), jnp.zeros(q.shape, jnp.float32))
    if isinstance(tiles, int):
        return add_tile(0, state)
    return jax.lax.fori_loop(0, tiles, add_tile, state)


def attend(
    q: Float[Array, "b z q h k"],
    keys: Float[Array, "b z s k"],
    mask: Bool[Array, "b z q s"],
    compressed: Compressed | Folded | None,
    sink: Float[Array, " h"],
) -> tuple[Float[Array, "b z q h k"], Float[Array, "b z q c"] | None]:
    """Attend: z = q kv / sqrt(k), p = exp(z) / (sum exp(z) + exp(sink_h)), o = sum p kv.

    The sink takes weight and gives no value. The softmax is float32; the weights meet the values
    in the dtype of q.

    Returns o and, for entries with scores, the sum of their p over the heads.

    Source: report 2.3; fact sheet 2.3.
    """
    parts = [(keys, "bzsk", mask)]
    if isinstance(compressed, Compressed):
        own = compressed.entries.ndim == 5
        parts.append((compressed.entries, "bzqsk" if own else "bsk", compressed.mask))
    scale = q.shape[-1] ** -0.5
    logits = [
        jnp.where(seen[..., None, :], _product(f"bzqhk,{axes}->bzqhs", q, kv) * scale, -jnp.inf)
        for kv, axes, seen in parts
    ]
    top = compressed.top if isinstance(compressed, Folded) else sink
    for z in logits:
        top = jnp.maximum(top, jnp.max(z, axis=-1, initial=-jnp.inf))  # there may be no entries
    top = jax.lax.stop_gradient(top)
    weights = [jnp.exp(z - top[..., None]) for z in logits]
    total = sum((jnp.sum(p, axis=-1) for p in weights), jnp.exp(sink - top))
    out = sum(
        _product(f"bzqhs,{axes}->bzqhk", p.astype(q.dtype), kv)
        for p, (kv, axes, _) in zip(weights, parts, strict=True)
    )
    if isinstance(compressed, Folded):
        shrink = jnp.exp(compressed.top - top)
        total = total + compressed.total * shrink
        out = out + compressed.out * shrink[..., None]
    mass = None
    if isinstance(compressed, Compressed) and compressed.scores is not None:
        mass = jnp.sum(weights[1] / total[..., None], axis=-2)
    return (out / total[..., None]).astype(q.dtype), mass


def _product(form: str, a: Array, b: Array) -> Array:
    return jnp.einsum(form, a, b, preferred_element_type=jnp.float32)


def _attend_blocks(
    blocks: QueryBlocks, sink, window: int, choose: Choose | None, entries: int, rows: int,
    teach: Teach | None = None,
) -> tuple[Float[Array, "b z q h k"], Lesson | None]:
    """Attend blocks of queries, as many at once as memory is meant for.

    Args:
      entries: compressed ones per query that are in memory at once.
      rows: that share the memory. With a cache each has its own, so that the number of blocks at
        once, which rounding may depend on, does not depend on the batch.
    """

    def attend_chunk(chunk: QueryBlocks):
        mask = window_mask(chunk.at_query, chunk.at_key, window, chunk.segments)
        compressed = None if choose is None else choose(chunk)
        out, mass = attend(chunk.q, chunk.keys, mask, compressed, sink)
        return out, None if teach is None else teach(compressed, mass)

    _, _, block, h, _ = blocks.q.shape
    slots = blocks.keys.shape[2] + entries
    heads = max([h] + [x.shape[3] for x in blocks.extra if x.ndim == 5])
    return map_chunks(attend_chunk, blocks, rows * block * heads * slots)


def _visible_mask(chunk: QueryBlocks, slots: int) -> Bool[Array, "b z q c"]:
    first, end = chunk.visible
    entry = jnp.arange(slots)
    return (entry >= first[..., None]) & (entry < end[..., None])


def _stretches(z: int, slots: int, block: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of blocks; several where entries outweigh the window and blocks suffice."""
    count = CAUSAL_STRETCHES if slots > 2 * block and z >= 4 * CAUSAL_STRETCHES else 1
    size = math.ceil(z / count)
    return ((begin, min(begin + size, z)) for begin in range(0, z, size))


def _to_blocks(
    q: Queries, keys: Keys, window: int, segment_ids: Tokens | None, layout: EntryLayout | None,
    extra: tuple, earlier: Earlier | None,
) -> QueryBlocks:
    """Cut rows into blocks of the window's length, or take a shorter row as one block.

    A block sees its own keys and those before it: the preceding block's, or the earlier ones.
    Before the only block of a row is nothing, unless there are earlier keys.
    """
    b, t = q.shape[:2]
    block = min(window, t)
    z = math.ceil(t / block)
    alone = z == 1 and earlier is None
    if earlier is None:
        nothing = jnp.zeros((b, block, keys.shape[2]), keys.dtype)
        earlier = Earlier(nothing, jnp.full((b, block), -1), jnp.zeros(b, jnp.int32))
    index = earlier.start[:, None] + jnp.arange(z * block)

    def to_blocks(x):
        x = jnp.pad(x, ((0, 0), (0, z * block - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(b, z, block, *x.shape[2:])

    def with_predecessor(x, first):
        x = to_blocks(x)
        if alone:
            return x
        first = first[:, None]
        before = first if z == 1 else jnp.concatenate([first, x[:, :-1]], axis=1)
        return jnp.concatenate([before, x], axis=2)

    segments = visible = None
    if segment_ids is not None:
        nobody = jnp.zeros((b, block), jnp.int32)
        segments = (to_blocks(segment_ids), with_predecessor(segment_ids, nobody))
    if layout is not None:
        visible = (to_blocks(layout.first), to_blocks(layout.end))
    return QueryBlocks(
        q=to_blocks(q),
        keys=with_predecessor(keys, earlier.keys),
        at_query=to_blocks(index),
        at_key=with_predecessor(index, earlier.positions),
        segments=segments,
        visible=visible,
        extra=tuple(map(to_blocks, extra)),
    )


def _from_blocks(x: Array, t: int) -> Array:
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :t]
