"""What the kernels of the indexer's loss compute, in plain JAX: every logit written out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.index_loss.parts import Inputs
from pallas_kernels.indexer.reference import scores

TINY = 1e-30  # a divisor for what sums to 0
LOWEST = -1e30  # a score whose exponential is 0 beside any other, and not NaN beside none


def index_loss(
    x: Inputs, mask: Bool[Array, "b t c"], best: Bool[Array, "b t c"] | None
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Return KL(attention || indexer) over the entries of a mask, and the best entries' share.

    The attention of an entry is exp(q kv / sqrt(k) - log_total), summed over heads.
    """
    q, entries = (y.astype(jnp.float32) for y in (x.q, x.entries))
    logits = jnp.einsum("bthk,bck->bthc", q, entries) * q.shape[-1] ** -0.5
    mass = jnp.sum(jnp.exp(logits - x.log_total[..., None]), axis=2)
    mass = jnp.where(mask, mass, 0.0)
    teacher = mass / jnp.maximum(jnp.sum(mass, axis=-1, keepdims=True), TINY)
    teacher = jax.lax.stop_gradient(teacher)
    found = jnp.where(mask, scores(x.queries, x.head_weights, x.keys), LOWEST)
    surprise = jnp.log(jnp.where(teacher > 0, teacher, 1.0)) - jax.nn.log_softmax(found)
    divergence = jnp.sum(jnp.where(teacher > 0, teacher * surprise, 0.0), axis=-1)
    if best is None:
        return divergence, jnp.zeros_like(divergence)
    return divergence, jnp.sum(jnp.where(best, teacher, 0.0), axis=-1)
