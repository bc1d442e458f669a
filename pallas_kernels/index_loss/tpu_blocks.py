"""What the TPU's programs of the indexer's loss have in common."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.blocks import pad_axes
from pallas_kernels.index_loss.parts import Inputs, Slopes
from pallas_kernels.sparse_attention.index import Blocks, first_block, last_block
from pallas_kernels.sparse_attention.seen import Seen, pack_chosen
from pallas_kernels.sparse_attention.tpu_queries import (
    ENTRIES,
    HEADS,
    LANES,
    blocks_of,
    by_block,
    product,
)

MEMORY = 48 * 2**20


class Fitted(NamedTuple):
    """Operands filled up with zeros to whole blocks; queries past the end give no mass."""

    q: Float[Array, "b t h k"]
    entries: Float[Array, "b c k"]
    log_total: Float[Array, "b z 1 rows"]  # of a block's heads
    queries: Float[Array, "b t i j"]
    head_weights: Float[Array, "b z 1 rows"]
    keys: Float[Array, "b c j"]
    numbers: Int[Array, "b t 2"]  # first entry and end of entries
    words: Int[Array, "b t w"] | None  # chosen entries, or the best of a range
    slopes: Float[Array, "b t 3"] | None


class Span(NamedTuple):
    """The blocks of entries that a block of queries attends to."""

    first: Int[Array, "b z"]
    last: Int[Array, "b z"]


def blocks_for(x: Inputs) -> Blocks:
    """Return how the work is cut up; there is no window."""
    return blocks_of(max(x.q.shape[2], x.queries.shape[2]), 1)


def fitted(
    x: Inputs, seen: Seen, blocks: Blocks, *, best: Seen | None = None,
    slopes: Slopes | None = None,
) -> tuple[Fitted, Span]:
    """Fill up to whole blocks; further heads weigh nothing."""
    size, t, choice = blocks.queries, x.q.shape[1], seen if best is None else best
    q, queries = (pad_axes(y, {1: size, 2: HEADS, 3: LANES}) for y in (x.q, x.queries))
    weights = pad_axes(x.head_weights.astype(jnp.float32), {1: size, 2: HEADS})
    after = (0, 0), (0, q.shape[1] - t)
    log_total = jnp.pad(
        x.log_total, (*after, (0, q.shape[2] - x.q.shape[2])), constant_values=jnp.inf
    )
    words = choice.words
    if words is None and choice.chosen is not None:
        words = pack_chosen(choice.chosen, x.entries.shape[1])
    if words is not None:
        words = jnp.pad(words, (*after, (0, 0)))
    first, end = (jnp.pad(y.astype(jnp.int32), after, mode="edge") for y in (seen.first, seen.end))
    least, most = (y.reshape(y.shape[0], -1, size) for y in (first, end))
    least, most = jnp.min(least, axis=-1), jnp.max(most, axis=-1)
    if slopes is not None:
        slopes = jnp.pad(jnp.stack(slopes, axis=-1), (*after, (0, 0)))
    fit = Fitted(
        q, pad_axes(x.entries, {1: ENTRIES, 2: LANES}), by_block(log_total, size * q.shape[2]),
        queries, by_block(weights, size * queries.shape[2]),
        pad_axes(x.keys, {1: ENTRIES, 2: LANES}), jnp.stack([first, end], axis=-1), words, slopes,
    )
    return fit, Span(first_block(least, most, ENTRIES), last_block(most, ENTRIES))


def mass_of(
    q: Float[Array, "q h k"], log_total: Float[Array, "rows 1"], entries: Float[Array, "s k"],
    scale: float,
) -> Float[Array, "q s"]:
    """Return the attention that the heads of queries give to a block of entries."""
    size, heads, width = q.shape
    logits = product(q.reshape(size * heads, width), entries, 1, 1) * scale
    return jnp.sum(jnp.exp(logits - log_total).reshape(size, heads, -1), axis=1)


def hits_of(queries: Float[Array, "q i j"], keys: Float[Array, "s j"]) -> Float[Array, "rows s"]:
    """Return relu(q . k)."""
    size, heads, width = queries.shape
    return jnp.maximum(product(queries.reshape(size * heads, width), keys, 1, 1), 0.0)


def scores_of(
    hits: Float[Array, "rows s"], weights: Float[Array, "rows 1"], queries: int
) -> Float[Array, "q s"]:
    """Return the scores of a block of entries."""
    return jnp.sum((hits * weights).reshape(queries, -1, hits.shape[1]), axis=1)


def score_gradient(
    hits: Float[Array, "rows s"], weights: Float[Array, "rows 1"], mass: Float[Array, "q s"],
    visible: Bool[Array, "q s"], slopes: Float[Array, "q 3"],
) -> Float[Array, "q s"]:
    """Return the gradient of the scores of a block of entries."""
    log_norm, share, rate = (slopes[:, i : i + 1] for i in range(3))
    learner = jnp.exp(scores_of(hits, weights, mass.shape[0]) - log_norm)
    return jnp.where(visible, share * learner - rate * mass, 0.0)


def hit_gradient(hits, weights, grad: Float[Array, "q s"]) -> Float[Array, "rows s"]:
    """Return the gradient of q . k from that of the scores."""
    return jnp.where(hits > 0, weights * of_heads(grad, hits.shape[0]), 0.0)


def of_heads(x: Float[Array, "q s"], rows: int) -> Float[Array, "rows s"]:
    """Repeat what belongs to queries for each of their heads."""
    queries, columns = x.shape
    return jnp.broadcast_to(x[:, None], (queries, rows // queries, columns)).reshape(rows, columns)
