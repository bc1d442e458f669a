"""The attention core by the kernels of a device, in place of `core` and `csa`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.attention.csa import best_entries
from dsv4_jax.attention.indexer import IndexQueries
from dsv4_jax.attention.layout import EntryLayout, document_offsets
from dsv4_jax.attention.lesson import Lesson
from dsv4_jax.collectives import gather_over
from dsv4_jax.config import CSA, FP4, ModelConfig, Runtime
from dsv4_jax.shapes import Array, Entries, Float, Keys, Queries, Tokens
from pallas_kernels import index_loss, indexer, sparse_attention
from pallas_kernels.implementation import XLA, choose
from pallas_kernels.sparse_attention import Seen


def takes_over(q: Queries, runtime: Runtime, kind: str) -> bool:
    """Say whether kernels do the attention of a layer.

    Where what an indexer learns from it is plain JAX, so is the attention.
    """
    if kind == CSA and runtime.index_learns:
        implementation = runtime.implementation("index_loss")
        if index_loss.choose_for(q, implementation) == XLA:
            return False
    implementation = runtime.implementation("sparse_attention")
    return sparse_attention.choose_for(q, implementation) != XLA


def attend(
    q: Queries, keys: Keys, entries: Entries | None, sink: Float[Array, " h"],
    index: IndexQueries | None, *, config: ModelConfig, runtime: Runtime,
    layout: EntryLayout | None, segment_ids: Tokens | None,
) -> tuple[Queries, Lesson | None]:
    """Attend each query to its window and to visible entries: to all, or to the best by index.

    Returns the output and what the indexer is to learn, each field [b, t], if it learns.
    """
    seen, best, lesson = seen_by(q.shape[:2], layout, segment_ids), None, None
    sparse, learns = runtime.csa == "sparse", runtime.index_learns
    if index is not None and entries.shape[1] > config.index_topk and (sparse or learns):
        # As served models do, the choice compares rounded scores; recall is that of the exact.
        best = _chosen(index, seen, config, runtime, rounded=sparse and runtime.indexer == FP4)
    if sparse and best is not None:
        seen, best = best, None
    out, log_total = sparse_attention.sparse_attention(
        q, keys, entries, sink, seen, config.sliding_window,
        runtime.implementation("sparse_attention"),
    )
    if index is not None and learns:
        lesson = _lesson(q, entries, log_total, index, seen, best, config, runtime)
    return out, lesson


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


def _chosen(
    index: IndexQueries, seen: Seen, config: ModelConfig, runtime: Runtime, *, rounded: bool
) -> Seen:
    """Add the best entries to what is seen, in ascending order; the choice has no gradient."""
    index = jax.lax.stop_gradient(index)
    chosen = choose("indexer", runtime.implementation("indexer"))
    if chosen == XLA:
        best = best_entries(index, seen.first, seen.end, config.index_topk, rounded=rounded)
        count = index.keys.shape[1]
        best = jnp.sort(jnp.where(best < 0, count, best), axis=-1)
        return seen._replace(chosen=jnp.where(best < count, best, -1))
    return indexer.select(*index, seen, config.index_topk, chosen, rounded=rounded)


def _lesson(
    q: Queries, entries: Entries, log_total: Float[Array, "b t h"], index: IndexQueries,
    seen: Seen, best: Seen | None, config: ModelConfig, runtime: Runtime,
) -> Lesson:
    """Compare index scores with the attention that entries get.

    Args:
      best: the choice among all entries that are attended to; None: they are chosen, or so few
        that all would be.
    """
    if not entries.shape[1]:
        return Lesson(*jnp.zeros((3, *q.shape[:2])))
    # What an indexer learns from is the attention of all heads.
    q, entries, log_total = jax.lax.stop_gradient((q, entries, log_total))
    q, log_total = (gather_over(x, "tensor", 2, runtime.mesh) for x in (q, log_total))
    divergence, recall = index_loss.index_loss(
        q, entries, log_total, *index, seen, best,
        runtime.implementation("index_loss"),
    )
    if best is None:
        return Lesson(divergence, jnp.zeros_like(divergence), jnp.zeros_like(divergence))
    choices = (seen.end - seen.first > config.index_topk).astype(jnp.float32)
    return Lesson(divergence, recall * choices, choices)
