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


class QueryBlocks(NamedTuple):
    """What belongs to queries, each leaf [b, z, q, ...] in blocks of q tokens."""

    q: Float[Array, "b z q h k"]
    keys: Float[Array, "b z s k"]  # of the block and of its predecessor
    segments: tuple[Array, Array] | None  # document of each query and of each of its key slots
    visible: tuple[Array, Array] | None  # range of compressed entries, first and end
    extra: tuple  # what the choice of entries needs per query
    index: Int[Array, "b z"]  # number of the block in its row


Choose = Callable[[tuple, Entries, Bool[Array, "b z q c"]], Compressed]


def attend_window(
    q: Queries, keys: Keys, sink: Float[Array, " h"], *, window: int, segment_ids: Tokens | None
) -> Queries:
    """Attend each query to the last `window` tokens of its document, itself included."""
    blocks = _to_blocks(q, keys, min(window, q.shape[1]), segment_ids, None, ())
    out = _attend_stretch(blocks, None, sink, window, None)
    return _from_blocks(out, q.shape[1])


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
    choose: Choose,
    extra: tuple = (),
) -> Queries:
    """Attend each query to its window and to the compressed entries that `choose` picks for it.

    Args:
      ratio: tokens per entry.
      choose: from (extra of the queries, entries, mask of the visible ones) to `Compressed`.
      extra: arrays [b, t, ...] that `choose` needs, passed to it block by block.
    """
    t, slots = q.shape[1], entries.shape[1]
    block = min(window, t)
    blocks = _to_blocks(q, keys, block, segment_ids, layout, extra)
    outs = []
    for begin, end in _stretches(blocks.q.shape[1], slots, block):
        stretch = jax.tree.map(lambda x, a=begin, z=end: x[:, a:z], blocks)
        # Entries are numbered by their last token: none beyond this is complete, in any document.
        seen = entries[:, : end * block // ratio]
        outs.append(_attend_stretch(stretch, seen, sink, window, choose))
    return _from_blocks(jnp.concatenate(outs, axis=1), t)


def all_visible(extra: tuple, entries: Entries, mask: Bool[Array, "b z q c"]) -> Compressed:
    """Choose every visible entry: HCA, and CSA before its indexer is brought in."""
    return Compressed(entries, mask)


def attend(
    q: Float[Array, "b z q h k"],
    keys: Float[Array, "b z s k"],
    mask: Bool[Array, "b z q s"],
    compressed: Compressed | None,
    sink: Float[Array, " h"],
) -> Float[Array, "b z q h k"]:
    """Attend: z = q kv / sqrt(k), p = exp(z) / (sum exp(z) + exp(sink_h)), o = sum p kv.

    The sink takes weight and gives no value. The softmax is float32; the weights meet the values
    in the dtype of q.

    Source: report 2.3; fact sheet 2.3.
    """
    parts = [(keys, "bzsk", mask)]
    if compressed is not None:
        own = compressed.entries.ndim == 5
        parts.append((compressed.entries, "bzqsk" if own else "bsk", compressed.mask))
    scale = q.shape[-1] ** -0.5
    logits = [
        jnp.where(seen[..., None, :], _product(f"bzqhk,{axes}->bzqhs", q, kv) * scale, -jnp.inf)
        for kv, axes, seen in parts
    ]
    top = sink
    for z in logits:
        top = jnp.maximum(top, jnp.max(z, axis=-1, initial=-jnp.inf))  # there may be no entries
    top = jax.lax.stop_gradient(top)
    weights = [jnp.exp(z - top[..., None]) for z in logits]
    total = sum((jnp.sum(p, axis=-1) for p in weights), jnp.exp(sink - top))
    out = sum(
        _product(f"bzqhs,{axes}->bzqhk", p.astype(q.dtype), kv)
        for p, (kv, axes, _) in zip(weights, parts, strict=True)
    )
    return (out / total[..., None]).astype(q.dtype)


def _product(form: str, a: Array, b: Array) -> Array:
    return jnp.einsum(form, a, b, preferred_element_type=jnp.float32)


def _attend_stretch(blocks: QueryBlocks, entries, sink, window: int, choose: Choose | None):
    """Attend the blocks of one stretch, chunk by chunk."""

    def attend_chunk(chunk: QueryBlocks):
        block = chunk.q.shape[2]
        mask = window_mask(block, window, chunk.index, chunk.segments)
        compressed = None
        if choose is not None:
            compressed = choose(chunk.extra, entries, _visible_mask(chunk, entries.shape[1]))
        return attend(chunk.q, chunk.keys, mask, compressed, sink)

    b, _, block, h, _ = blocks.q.shape
    slots = 2 * block + (0 if entries is None else entries.shape[1])
    heads = max([h] + [x.shape[3] for x in blocks.extra if x.ndim == 5])
    return map_chunks(attend_chunk, blocks, b * block * heads * slots)


def _visible_mask(chunk: QueryBlocks, slots: int) -> Bool[Array, "b z q c"]:
    first, end = chunk.visible
    entry = jnp.arange(slots)
    return (entry >= first[..., None]) & (entry < end[..., None])


def _stretches(z: int, slots: int, block: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of blocks; several where entries outweigh the window and blocks suffice."""
    count = CAUSAL_STRETCHES if slots > 2 * block and z >= 4 * CAUSAL_STRETCHES else 1
    size = math.ceil(z / count)
    return ((begin, min(begin + size, z)) for begin in range(0, z, size))


def _to_blocks(q, keys, block, segment_ids, layout, extra) -> QueryBlocks:
    b, t = q.shape[:2]
    z = math.ceil(t / block)

    def to_blocks(x):
        x = jnp.pad(x, ((0, 0), (0, z * block - t), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(b, z, block, *x.shape[2:])

    def with_predecessor(x):
        before = jnp.pad(x[:, :-1], ((0, 0), (1, 0), *((0, 0),) * (x.ndim - 2)))
        return jnp.concatenate([before, x], axis=2)

    segments = visible = None
    if segment_ids is not None:
        of_query = to_blocks(segment_ids)
        segments = (of_query, with_predecessor(of_query))
    if layout is not None:
        visible = (to_blocks(layout.first), to_blocks(layout.end))
    return QueryBlocks(
        q=to_blocks(q),
        keys=with_predecessor(to_blocks(keys)),
        segments=segments,
        visible=visible,
        extra=tuple(map(to_blocks, extra)),
        index=jnp.broadcast_to(jnp.arange(z), (b, z)),
    )


def _from_blocks(x: Array, t: int) -> Array:
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :t]
