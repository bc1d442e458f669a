"""What a model keeps of the tokens that it has read: explicit pytrees of fixed shapes.

Every layer has a ring of the last window's keys. CSA and HCA layers have their compressed entries
beside it, and the projections of tokens whose block is not complete; CSA layers have the same two
of their indexer. Arrays of layers that are scanned are stacked; those of other layers are stacks
of one.

Rows of a batch have their own lengths. Nothing is ever cleared: whatever lies at or beyond a row's
length is not read before it is written. Hence a cache is emptied by setting lengths to 0, and a
row forgets its last token by setting its length one back: a ring then lacks only the slot of the
oldest token, which the next query no longer sees.

Source: fact sheet 2.8.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.cache_format import check_served, entry_array, index_key_array
from dsv4_jax.config import CSA, HCA, SERVED, WINDOW, ModelConfig, Runtime
from dsv4_jax.errors import InputError
from dsv4_jax.schedule import BlockGroup, block_groups
from dsv4_jax.shapes import Array, Float, Int

# Compressed entries are read in tiles of so many, and stored up to a multiple of it: how sums are
# grouped then does not depend on the size of the cache. Index keys are read in larger ones.
ENTRY_TILE = 256
INDEX_TILE = 8192


class Pending(NamedTuple):
    """The compressor's projections of the last tokens, at their position modulo the slots."""

    values: Float[Array, "z b p *u k"]  # u: the two series of an overlapping compressor
    gates: Float[Array, "z b p *u k"]


class EntryStore(NamedTuple):
    """The compressed entries of a compressor, in the cache's format, and what is pending."""

    entries: Array  # [z, b, c, stored width]
    pending: Pending


class LayerCache(NamedTuple):
    """What layers of one attention kind keep."""

    window: Array  # [z, b, window, stored width]: keys at their position modulo the window
    main: EntryStore | None  # CSA and HCA
    index: EntryStore | None  # CSA


class MTPCache(NamedTuple):
    """What drafting by multi-token prediction keeps."""

    layer: LayerCache
    streams: Float[Array, "b n d"]  # of each row's last token, after the main model's last layer


class StackedCache(NamedTuple):
    """The cache of one layer, within its stack."""

    stack: LayerCache
    layer: Int[Array, ""]


class Cache(NamedTuple):
    """The state of a batch of rows."""

    length: Int[Array, " b"]  # tokens that each row has read
    layers: dict[str, LayerCache]  # by the path of the layer's block
    mtp: MTPCache | None


class Span(NamedTuple):
    """The tokens that a call adds to each row."""

    start: Int[Array, " b"]  # position of the first
    count: Int[Array, " b"]  # how many there are; the rest of the row is padding


def init_cache(
    config: ModelConfig, runtime: Runtime, *, rows: int, max_length: int, drafting: bool = False
) -> Cache:
    """Make an empty cache.

    Args:
      runtime: says how keys and entries are stored.
      rows: of the batch.
      max_length: tokens that a row may come to have.
      drafting: keep what drafts by multi-token prediction need, too.
    Raises:
      InputError: a size is impossible, or the model cannot have such a cache.
    """
    _check_sizes(config, runtime, rows, max_length, drafting)
    layers = {
        path: _layer_cache(config, runtime, group, rows, max_length)
        for path, group in block_groups(config).items()
    }
    mtp = None
    if drafting:
        layer = _layer_cache(config, runtime, BlockGroup(WINDOW, 1), rows, max_length)
        shape = (rows, config.hc_mult, config.hidden_size)
        mtp = MTPCache(layer, jnp.zeros(shape, runtime.compute_dtype))
    return Cache(jnp.zeros(rows, jnp.int32), layers, mtp)


def _check_sizes(
    config: ModelConfig, runtime: Runtime, rows: int, max_length: int, drafting: bool
) -> None:
    context = config.max_position_embeddings
    if rows < 1:
        raise InputError(f"rows: expected at least 1, got {rows}")
    if not 1 <= max_length <= context:
        raise InputError(
            f"max_length: expected 1 to {context} tokens (max_position_embeddings), got "
            f"{max_length}"
        )
    if runtime.index_format == SERVED and CSA in config.layer_types:
        check_served(config.index_head_dim)
    if drafting and not config.num_nextn_predict_layers:
        raise InputError(
            "drafting: expected a model with multi-token prediction, got one without; turn it off"
        )


def _layer_cache(
    config: ModelConfig, runtime: Runtime, group: BlockGroup, rows: int, max_length: int
) -> LayerCache:
    lead = (group.layers, rows)
    entry_width, dtype = entry_array(config, runtime.entry_format)
    window = jnp.zeros((*lead, config.sliding_window, entry_width), dtype)
    if group.kind == WINDOW:
        return LayerCache(window, None, None)
    ratio = config.ratio(group.kind)
    slots = max(1, -(-(max_length // ratio) // ENTRY_TILE)) * ENTRY_TILE

    def store(width: int, stored_width: int, dtype: jnp.dtype) -> EntryStore:
        # An overlapping compressor has two series and needs the block before the current one.
        block = (2 * ratio, 2) if group.kind == CSA else (ratio,)
        pending = Pending(*(jnp.zeros((*lead, *block, width), jnp.float32) for _ in range(2)))
        return EntryStore(jnp.zeros((*lead, slots, stored_width), dtype), pending)

    main = store(config.head_dim, entry_width, dtype)
    if group.kind == HCA:
        return LayerCache(window, main, None)
    stored = index_key_array(config, runtime.index_format)
    return LayerCache(window, main, store(config.index_head_dim, *stored))


def ring_positions(start: Int[Array, " b"], slots: int) -> Int[Array, "b slots"]:
    """Return the position of the token in each slot of a ring; negative where there is none.

    Args:
      start: tokens that came before, the last of which is in the ring.
    """
    last = start[:, None] - 1
    return last - (last - jnp.arange(slots)) % slots


def after_ring(ring: Array, new: Array, start: Int[Array, " b"]) -> Array:
    """Put what a ring holds before new tokens, by position: [b, slots + t, ...].

    Args:
      ring: [b, slots, ...].
      new: [b, t, ...].
      start: tokens that came before the new ones.
    """
    order = (start[:, None] + jnp.arange(ring.shape[1])) % ring.shape[1]
    before = jax.vmap(lambda row, i: row[i])(ring, order)
    return jnp.concatenate([before, new], axis=1)


def write_ring(ring: Array, layer: Int[Array, ""], new: Array, span: Span) -> Array:
    """Put the last of a span's tokens into one layer's ring, at their position modulo the slots.

    Args:
      ring: [z, b, slots, ...].
      new: [b, t, ...], of the tokens of the span.
    """
    slots, t = ring.shape[2], new.shape[1]
    index = jnp.arange(t)
    if t > slots:  # of the tokens that share a slot, only the last may be written
        index = span.count[:, None] - slots + jnp.arange(slots)
        new = jax.vmap(lambda row, i: row[i])(new, jnp.clip(index, 0, t - 1))
    written = (index >= 0) & (index < span.count[:, None])
    slot = jnp.where(written, (span.start[:, None] + index) % slots, slots)
    rows = jnp.arange(ring.shape[1])[:, None]
    return ring.at[layer, rows, slot].set(new.astype(ring.dtype), mode="drop")


def write_entries(
    entries: Array, layer: Int[Array, ""], new: Array, first: Int[Array, " b"],
    end: Int[Array, " b"],
) -> Array:
    """Store new entries [b, c, ...] of one layer, numbered from `first` and kept below `end`."""
    number = first[:, None] + jnp.arange(new.shape[1])
    slot = jnp.where(number < end[:, None], number, entries.shape[2])
    rows = jnp.arange(entries.shape[1])[:, None]
    return entries.at[layer, rows, slot].set(new, mode="drop")


def read_tile(
    entries: Array, layer: Int[Array, ""], start: Int[Array, ""] | int, size: int
) -> Array:
    """Return one layer's stored entries [start, start + size), [b, size, stored width]."""
    rows, width = entries.shape[1], entries.shape[3]
    return jax.lax.dynamic_slice(entries, (layer, 0, start, 0), (1, rows, size, width))[0]


def read_chosen(entries: Array, layer: Int[Array, ""], index: Int[Array, "b z q l"]) -> Array:
    """Return one layer's stored entries of the given numbers, [b, z, q, l, stored width]."""
    rows = jnp.arange(entries.shape[1])[:, None, None, None]
    return entries[layer, rows, index]
