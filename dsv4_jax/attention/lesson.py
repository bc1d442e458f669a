"""What a lightning indexer learns: to score entries as the main attention weighs them.

The teacher is the probability that the heads of the main attention together give to each
compressed entry, of the one softmax over window, entries and sink, normalised over the entries
that the query sees; the indexer's softmax is brought to it. Neither reaches across: the teacher
gets no gradient, and the inputs of the indexer are detached.

Source: V4's report names the warm-up but no loss; this is DeepSeek-V3.2's, over compressed
entries (fact sheet 5 and 13 E).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.attention.indexer import top_mask
from dsv4_jax.shapes import Array, Bool, Float

MASKED = -1e30  # a score whose exponential is 0 beside any other, and not NaN beside none


class Lesson(NamedTuple):
    """What queries tell of an indexer; summed over queries where no axis is left."""

    divergence: Float[Array, "*z"]  # KL(attention || indexer), nats
    recall: Float[Array, "*z"]  # share of the attention that the indexer's best k entries get
    choices: Float[Array, "*z"]  # 1 where more than k entries are seen, so that recall counts


def lesson_of(
    scores: Float[Array, "b z q c"],
    mask: Bool[Array, "b z q c"],
    mass: Float[Array, "b z q c"],
    topk: int | None,
) -> Lesson:
    """Compare index scores with the attention that entries get, each result [b, z, q].

    Args:
      mask: entries to compare over: those attended to. Without any the lesson is empty.
      mass: attention probability summed over heads, 0 outside the mask.
      topk: how many entries the indexer is to choose; None: they are already chosen.
    """
    teacher = jax.lax.stop_gradient(mass)
    teacher = teacher / jnp.maximum(jnp.sum(teacher, axis=-1, keepdims=True), 1e-30)
    learner = jax.nn.log_softmax(jnp.where(mask, scores, MASKED), axis=-1)
    surprise = jnp.log(jnp.where(teacher > 0, teacher, 1.0)) - learner
    divergence = jnp.sum(jnp.where(teacher > 0, teacher * surprise, 0.0), axis=-1)
    if topk is None:
        nothing = jnp.zeros_like(divergence)
        return Lesson(divergence, nothing, nothing)
    chosen = top_mask(jax.lax.stop_gradient(scores), mask, topk)
    chooses = (jnp.sum(mask, axis=-1) > topk).astype(jnp.float32)
    recall = jnp.sum(jnp.where(chosen, teacher, 0.0), axis=-1)
    return Lesson(divergence, recall * chooses, chooses)
