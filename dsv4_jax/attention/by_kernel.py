"""The attention core by the kernels of a device, in place of `core` and `csa`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.attention.csa import best_entries
from dsv4_jax.attention.indexer import IndexQueries
from dsv4_jax.attention.layout import EntryLayout, document_offsets
from dsv4_jax.config import CSA, FP4, ModelConfig, Runtime
from dsv4_jax.shapes import Array, Entries, Float, Keys, Queries, Tokens
from pallas_kernels import indexer, sparse_attention
from pallas_kernels.implementation import XLA, choose
from pallas_kernels.sparse_attention import Seen


def takes_over(q: Queries, runtime: Runtime, kind: str) -> bool:
    """Say whether kernels do the attention of a layer.

    What an indexer learns from the attention is plain JAX, and so is that attention.
    """
    if kind == CSA and runtime.index_learns:
        return False
    implementation = runtime.implementation("sparse_attention")
    return sparse_attention.choose_for(q, implementation) != XLA


def attend(
    q: Queries, keys: Keys, entries: Entries | None, sink: Float[Array, " h"],
    index: IndexQueries | None, *, config: ModelConfig, runtime: Runtime,
    layout: EntryLayout | None, segment_ids: Tokens | None,
) -> Queries:
    """Attend each query to its window and to visible entries: to all, or to the best by index."""
    seen = seen_by(q.shape[:2], layout, segment_ids)
    if index is not None and entries.shape[1] > config.index_topk:
        seen = _chosen(index, seen, config, runtime)
    return sparse_attention.sparse_attention(
        q, keys, entries, sink, seen, config.sliding_window,
        runtime.implementation("sparse_attention"),
    )[0]


def seen_by(
    shape: tuple[int, int], layout: EntryLayout | None, segment_ids: Tokens | None
) -> Seen:
    """Return what queries see of keys and entries."""
    place = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    first_key = jnp.zeros_like(place)
    if segment_ids is not None:
        first_key = place - document_offsets(segment_ids)
    if layout is None:
        return Seen(first_key)
    return Seen(first_key, layout.first, layout.end)


def _chosen(index: IndexQueries, seen: Seen, config: ModelConfig, runtime: Runtime) -> Seen:
    """Add the best entries to what is seen; the choice has no gradient."""
    index, rounded = jax.lax.stop_gradient(index), runtime.indexer == FP4
    chosen = choose("indexer", runtime.implementation("indexer"))
    if chosen == XLA:
        best = best_entries(index, seen.first, seen.end, config.index_topk, rounded=rounded)
        return seen._replace(chosen=best)
    return indexer.select(*index, seen, config.index_topk, chosen, rounded=rounded)


