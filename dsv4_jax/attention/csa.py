"""Compressed sparse attention: the window and the best k of the overlapping compressed entries."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from dsv4_jax.attention.core import Compressed, all_visible, attend_hybrid
from dsv4_jax.attention.indexer import IndexQueries, index_scores, top_entries, top_mask
from dsv4_jax.attention.layout import EntryLayout
from dsv4_jax.cache_format import round_scores
from dsv4_jax.chunks import keep
from dsv4_jax.config import SERVED
from dsv4_jax.shapes import Array, Bool, Entries, Float, Keys, Queries, Tokens

# Up to this many entries per selected one, masking all of them costs less than gathering the
# selected: a gather moves k rows per query, a mask multiplies all rows by matrix units.
MASK_UP_TO = 4


def attend_selected(
    q: Queries,
    keys: Keys,
    entries: Entries,
    index: IndexQueries,
    sink: Float[Array, " h"],
    *,
    topk: int,
    rounded: bool = False,
    window: int,
    ratio: int,
    layout: EntryLayout,
    segment_ids: Tokens | None,
) -> Queries:
    """Attend each query to its window and to its `topk` best visible entries by index score.

    The choice has no gradient: the indexer learns from a loss of its own.

    Args:
      rounded: compare scores in bfloat16, as served models do.
    """
    index = jax.lax.stop_gradient(index)
    choose = partial(_choose, index_keys=index.keys, topk=topk, rounded=rounded)
    return attend_hybrid(
        q, keys, entries, sink, window=window, ratio=ratio, layout=layout,
        segment_ids=segment_ids, choose=choose, extra=(index.queries, index.head_weights),
    )


def _choose(
    extra: tuple, entries: Entries, visible: Bool[Array, "b z q c"], index_keys: Array, topk: int,
    rounded: bool,
) -> Compressed:
    slots = entries.shape[1]
    if slots <= topk:
        return all_visible(extra, entries, visible)
    queries, head_weights = extra
    scores = index_scores(queries, head_weights, index_keys[:, :slots])
    scores = round_scores(scores, SERVED) if rounded else scores
    if slots <= MASK_UP_TO * topk:
        packed = keep(jnp.packbits(top_mask(scores, visible, topk), axis=-1))
        chosen = jnp.unpackbits(packed, axis=-1, count=slots).astype(bool)
        return Compressed(entries, chosen)
    chosen, exists = jax.tree.map(keep, top_entries(scores, visible, topk))
    return Compressed(jax.vmap(lambda rows, i: rows[i])(entries, chosen), exists)
