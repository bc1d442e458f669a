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
from dsv4_jax.shapes import Array, Bool, Float, Int, Keys, Queries
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

    def chosen(self, index: Int[Array, "b z q l"], dtype: jnp.dtype) -> Array:
        """Return the entries of the given numbers, [b, z, q, l, k]."""
        rows = read_chosen(self.entries, self.layer, index)
        return decode_entry(rows, self.config, self.form, dtype)


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
    layout: EntryLayout, earlier: Earlier, kernel: Callable | None = None,
) -> Queries:
    """Attend each query to its window and to all entries that it sees.

    Args:
      kernel: does so, if given, as `by_kernel.over_cache` returns it.
    """
    if kernel is not None:
        return kernel(entries=stored.entries, end=layout.end)
    tiles = _tiles(stored.entries.shape[2], ENTRY_TILE, layout.end)

    def choose(chunk: QueryBlocks):
        return fold_entries(chunk, sink, partial(stored.tile, dtype=q.dtype), tiles)

    return attend_cached(
        q, keys, sink, window=window, layout=layout, earlier=earlier, choose=choose,
        slots=ENTRY_TILE,
    )


def attend_best(
    q: Queries, keys: Keys, sink: Float[Array, " h"], stored: StoredEntries,
    index_keys: StoredEntries, asked: IndexQueries, *, window: int, layout: EntryLayout,
    earlier: Earlier, implementation: str = XLA, kernel: Callable | None = None,
) -> Queries:
    """Attend each query to its window and to its best visible entries by index score.

    Args:
      index_keys: of all entries.
      asked: the queries of the indexer.
      implementation: of the choice of entries.
      kernel: attends, if given, as `by_kernel.over_cache` returns it.
    """
    index, exists = select_entries(index_keys, asked, layout.end, implementation)
    if kernel is not None:
        return kernel(entries=stored.entries, chosen=jnp.where(exists, index, -1))

    def choose(chunk: QueryBlocks) -> Compressed:
        index, exists = chunk.extra
        return Compressed(stored.chosen(index, q.dtype), exists)

    return attend_cached(
        q, keys, sink, window=window, layout=layout, earlier=earlier, choose=choose,
        slots=index.shape[-1], extra=(index, exists),
    )


def select_entries(
    stored: StoredEntries, asked: IndexQueries, end: Int[Array, "b t"], implementation: str = XLA
) -> tuple[Int[Array, "b t l"], Bool[Array, "b t l"]]:
    """Return the numbers of each query's best entries and which of them exist.

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
        numbers = select_stored(
            queries, asked.head_weights, index_keys, layer, end, k, implementation
        )
        return jnp.maximum(numbers, 0), numbers >= 0

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
    return numbers, scores > -jnp.inf


def _tiles(slots: int, size: int, end: Int[Array, "b t"]) -> Int[Array, ""] | int:
    """Return how many tiles hold all that any query sees; 1 if there is no more than one."""
    if slots <= size:
        return 1
    return -(-jnp.minimum(jnp.max(end), slots) // size)
