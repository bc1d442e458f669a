"""Compressed sparse attention: the window and overlapping compressed entries, all or the best k."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsv4_jax.attention.core import Compressed, all_visible, attend_hybrid
from dsv4_jax.attention.indexer import IndexQueries, index_scores, top_entries, top_mask
from dsv4_jax.attention.layout import EntryLayout
from dsv4_jax.attention.lesson import Lesson, lesson_of
from dsv4_jax.cache_format import round_scores
from dsv4_jax.chunks import keep, map_chunks
from dsv4_jax.collectives import sum_over
from dsv4_jax.config import SERVED
from dsv4_jax.shapes import Array, Bool, Entries, Float, Int, Keys, Queries, Tokens

# Up to this many entries per selected one, masking all of them costs less than gathering the
# selected: a gather moves k rows per query, a mask multiplies all rows by matrix units.
MASK_UP_TO = 4


def attend_csa(
    q: Queries,
    keys: Keys,
    entries: Entries,
    index: IndexQueries,
    sink: Float[Array, " h"],
    *,
    topk: int,
    sparse: bool,
    learn: bool,
    rounded: bool = False,
    window: int,
    ratio: int,
    layout: EntryLayout,
    segment_ids: Tokens | None,
    mesh: Mesh | None = None,
) -> tuple[Queries, Lesson | None]:
    """Attend each query to its window and to visible entries.

    Args:
      index: what the indexer asks. The choice of entries has no gradient.
      sparse: attend to the `topk` best entries by index score, not to all.
      learn: return what the indexer is to learn from the entries that are attended to, each
        field [b, t].
      rounded: the choice compares scores in bfloat16, as served models do.
      mesh: whose axis "tensor" the heads are spread over.
    """
    choose = partial(
        _choose, index_keys=index.keys, topk=topk if sparse else None, learn=learn,
        rounded=rounded,
    )
    teach = None
    if learn:
        def teach(chosen: Compressed, mass: Array) -> Lesson:
            mass = sum_over(mass, ("tensor",), mesh)
            return lesson_of(chosen.scores, chosen.mask, mass, None if sparse else topk)
    return attend_hybrid(
        q, keys, entries, sink, window=window, ratio=ratio, layout=layout,
        segment_ids=segment_ids, choose=choose, extra=(index.queries, index.head_weights),
        teach=teach,
    )


def best_entries(
    index: IndexQueries, first: Tokens, end: Tokens, topk: int, *, rounded: bool
) -> Int[Array, "b t l"]:
    """Return the numbers of each query's best entries from `first` to before `end`; -1: none."""
    number = jnp.arange(index.keys.shape[1])

    def best(piece):
        queries, head_weights, first, end = piece
        scores = index_scores(queries[:, None], head_weights[:, None], index.keys)[:, 0]
        scores = round_scores(scores, SERVED) if rounded else scores
        visible = (number >= first[..., None]) & (number < end[..., None])
        chosen, exists = top_entries(scores, visible, topk)
        return jnp.where(exists, chosen, -1)

    pieces = (index.queries, index.head_weights, first, end)
    return map_chunks(best, pieces, index.queries.shape[2] * number.size)


def _choose(
    extra: tuple, entries: Entries, visible: Bool[Array, "b z q c"], index_keys: Array,
    topk: int | None, learn: bool, rounded: bool,
) -> Compressed:
    """Choose the best k entries, or all of them for None; add their scores if these are to learn.
    """
    queries, head_weights = extra
    slots = entries.shape[1]
    index_keys = index_keys[:, :slots]
    everything = topk is None or slots <= topk
    if everything and not learn:
        return all_visible(extra, entries, visible)
    scores = index_scores(queries, head_weights, index_keys)
    if everything:
        return Compressed(entries, visible, scores)
    detached = jax.lax.stop_gradient(scores)
    detached = round_scores(detached, SERVED) if rounded else detached
    if slots <= MASK_UP_TO * topk:
        packed = keep(jnp.packbits(top_mask(detached, visible, topk), axis=-1))
        chosen = jnp.unpackbits(packed, axis=-1, count=slots).astype(bool)
        return Compressed(entries, chosen, scores if learn else None)
    chosen, exists = jax.tree.map(keep, top_entries(detached, visible, topk))
    gather = jax.vmap(lambda rows, i: rows[i])
    if learn:
        # Of the gathered keys again: so the gradient is computed for the chosen entries alone.
        scores = index_scores(queries, head_weights, gather(index_keys, chosen))
    return Compressed(gather(entries, chosen), exists, scores if learn else None)
