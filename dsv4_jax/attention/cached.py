"""Attention over a cache: the window's ring, stored entries in tiles, the best of them by index."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.attention.core import Compressed, Earlier, QueryBlocks, attend_cached, fold_entries
from dsv4_jax.attention.indexer import IndexQueries, index_scores, one_zero
from dsv4_jax.attention.layout import EntryLayout
from dsv4_jax.cache import (
    ENTRY_TILE,
    INDEX_TILE,
    EntryStore,
    Pending,
    Span,
    read_chosen,
    read_tile,
    ring_positions,
    write_entries,
    write_ring,
)
from dsv4_jax.cache_format import (
    decode_entry,
    decode_index_key,
    encode_entry,
    round_index,
    round_scores,
)
from dsv4_jax.chunks import map_chunks
from dsv4_jax.config import ModelConfig
from dsv4_jax.shapes import Array, Float, Int, Keys, Queries
from pallas_kernels.implementation import XLA
from pallas_kernels.indexer.stored import MOST_TOKENS, choose_for, select_stored


class StoredEntries(NamedTuple):
    """The compressed entries of one layer, or its index keys, as a cache holds them."""

    entries: Array  # [z, b, c, stored width]
    layer: Int[Array, ""]
    config: ModelConfig
    form: str

    def tile(self, number: Int[Array, ""] | int, dtype: jnp.dtype) -> Array:
        """Return a tile of entries, [b, ENTRY_TILE, k]."""
        tile = read_tile(self.entries, self.layer, number * ENTRY_TILE, ENTRY_TILE)
        return decode_entry(tile, self.config, self.form, dtype)

    def seen(self, end: Int[Array, "b t"], dtype: jnp.dtype) -> Array:
        """Return all entries that queries see, [b, c, k]; see `read_seen`."""
        decode = partial(decode_entry, config=self.config, form=self.form, dtype=dtype)
        return read_seen(self.entries, self.layer, end, decode)

    def chosen(self, index: Int[Array, "b z q l"], dtype: jnp.dtype) -> Array:
        """Return the entries of the given numbers, [b, z, q, l, k]."""
        rows = read_chosen(self.entries, self.layer, index)
        return decode_entry(rows, self.config, self.form, dtype)


class Choice(NamedTuple):
    """What the choice of the best entries compares."""

    index_keys: StoredEntries  # of all entries
    asked: IndexQueries  # the queries of the indexer


def sees_all_entries(config: ModelConfig) -> bool:
    """Say whether the indexer's choice is never less than all entries, whatever a row's length.

    The length of a row, or of a cache, does not decide: how sums are grouped would depend on it.
    """
    return config.max_position_embeddings // config.csa_ratio <= config.index_topk


def read_and_write_window(
    ring: Array, layer: Int[Array, ""], keys: Keys, span: Span, config: ModelConfig, form: str
) -> tuple[Earlier, Keys, Array, Array]:
    """Return the keys that came before, the new ones, these as stored, and the ring with them."""
    stored = encode_entry(keys, config, form)
    before, keys = (decode_entry(x, config, form, keys.dtype) for x in (ring[layer], stored))
    earlier = Earlier(before, ring_positions(span.start, ring.shape[2]), span.start)
    return earlier, keys, stored, write_ring(ring, layer, stored, span)


def store_entries(
    store: EntryStore, layer: Int[Array, ""], new: Array, pending: Pending, span: Span, ratio: int
) -> EntryStore:
    """Keep those of the entries [b, c, stored width] whose blocks the span completes."""
    first, end = span.start // ratio, (span.start + span.count) // ratio
    return EntryStore(write_entries(store.entries, layer, new, first, end), pending)


def attend_all(
    q: Queries, keys: Keys, sink: Float[Array, " h"], stored: StoredEntries, *, window: int,
    layout: EntryLayout, earlier: Earlier,
) -> Queries:
    """Attend each query to its window and to all entries that it sees."""
    tiles = _tiles(stored.entries.shape[2], ENTRY_TILE, layout.end)

    def choose(chunk: QueryBlocks):
        return fold_entries(chunk, sink, partial(stored.tile, dtype=q.dtype), tiles)

    return attend_cached(
        q, keys, sink, window=window, layout=layout, earlier=earlier, choose=choose,
        slots=ENTRY_TILE,
    )


def attend_best(
    q: Queries, keys: Keys, sink: Float[Array, " h"], stored: StoredEntries, choice: Choice, *,
    window: int, layout: EntryLayout, earlier: Earlier, implementation: str,
) -> Queries:
    """Attend each query to its window and to its best visible entries by index score.

    Args:
      implementation: of the choice of entries.
    """
    best = select_entries(*choice, layout.end, implementation)

    def choose(chunk: QueryBlocks) -> Compressed:
        (best,) = chunk.extra
        return Compressed(stored.chosen(jnp.maximum(best, 0), q.dtype), best >= 0)

    return attend_cached(
        q, keys, sink, window=window, layout=layout, earlier=earlier, choose=choose,
        slots=best.shape[-1], extra=(best,),
    )


def read_seen(
    entries: Array, layer: Int[Array, ""], end: Int[Array, "b t"], decode: Callable
) -> Array:
    """Return one layer's stored entries, decoded, up to the last that any query sees.

    What lies past it in the array is finite and of no account.

    Args:
      end: one past the last entry that each query sees.
      decode: from stored entries to numbers.
    """
    slots = entries.shape[2]
    size = min(INDEX_TILE, slots)

    def tile(start):
        return decode(read_tile(entries, layer, start, size))

    tiles = _tiles(slots, size, end)
    if isinstance(tiles, int):
        return tile(0)
    nothing = jax.eval_shape(tile, 0)
    nothing = jnp.zeros((nothing.shape[0], slots, nothing.shape[2]), nothing.dtype)

    def add_tile(number, out):
        # The last tile may begin earlier, to end with the array.
        start = jnp.minimum(number * size, slots - size)
        return jax.lax.dynamic_update_slice_in_dim(out, tile(start), start, axis=1)

    return jax.lax.fori_loop(0, tiles, add_tile, nothing)


def select_entries(
    stored: StoredEntries, asked: IndexQueries, end: Int[Array, "b t"], implementation: str = XLA
) -> Int[Array, "b t l"]:
    """Return the numbers of each query's best entries; -1 where there are no more.

    Stored keys are scored tile by tile beside the best so far, so that no array is as long as the
    row. Ties go to the lowest number, as in `indexer.top_entries`.

    Args:
      implementation: for calls of few tokens, in which a kernel decodes keys as it scores them;
        longer ones do without.
    """
    index_keys, layer, config, form = stored
    width, k = config.index_head_dim, config.index_topk
    size = min(INDEX_TILE, index_keys.shape[2])
    queries = round_index(asked.queries, form)
    b, t, heads, _ = queries.shape
    if t <= MOST_TOKENS and choose_for(queries, index_keys, implementation) != XLA:
        return select_stored(
            queries, asked.head_weights, index_keys, layer, end, k, implementation
        )

    def best_of_tile(tile):
        # The last tile may begin earlier, to end with the array; what it repeats is left out.
        start = jnp.minimum(tile * size, index_keys.shape[2] - size)
        keys = read_tile(index_keys, layer, start, size)
        keys = decode_index_key(keys, width, form, asked.queries.dtype)
        number = start + jnp.arange(size)

        def score(piece):
            queries, head_weights, end = piece
            scores = index_scores(queries[:, :, None], head_weights[:, :, None], keys)[:, :, 0]
            seen = (number >= tile * size) & (number < end[..., None])
            return jnp.where(seen, round_scores(one_zero(scores), form), -jnp.inf)

        scores = map_chunks(score, (queries, asked.head_weights, end), heads * size)
        scores, place = jax.lax.top_k(scores, min(k, size))
        return scores, start + place

    def add_tile(tile, best):
        # Those so far come first: their numbers are lower, and win ties.
        scores, numbers = (
            jnp.concatenate(pair, axis=-1) for pair in zip(best, best_of_tile(tile), strict=True)
        )
        scores, place = jax.lax.top_k(scores, k)
        return scores, jnp.take_along_axis(numbers, place, axis=-1)

    tiles = _tiles(index_keys.shape[2], size, end)
    best = jnp.full((b, t, k), -jnp.inf), jnp.zeros((b, t, k), jnp.int32)
    # A single tile needs no loop, of which the number of operations could not be counted.
    single = isinstance(tiles, int)
    scores, numbers = add_tile(0, best) if single else jax.lax.fori_loop(0, tiles, add_tile, best)
    return jnp.where(scores > -jnp.inf, numbers, -1)


def _tiles(slots: int, size: int, end: Int[Array, "b t"]) -> Int[Array, ""] | int:
    """Return how many tiles hold all that any query sees; 1 if there is no more than one."""
    if slots <= size:
        return 1
    return -(-jnp.minimum(jnp.max(end), slots) // size)
