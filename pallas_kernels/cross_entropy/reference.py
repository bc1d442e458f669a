"""What the kernels of the cross-entropy compute, in plain JAX: all logits exist, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def token_nats(
    hidden: Float[Array, "t d"], head: Float[Array, "d v"], targets: Int[Array, " t"],
    weights: Float[Array, " t"],
) -> Float[Array, ""]:
    """Return the weighted sum of -log softmax(hidden head)[target], in nats, float32."""
    return -jnp.sum(weights * token_scores(hidden, head, targets)[0])


def token_scores(
    hidden: Float[Array, "t d"], head: Float[Array, "d v"], targets: Int[Array, " t"]
) -> tuple[Float[Array, " t"], Bool[Array, " t"]]:
    """Return log softmax(hidden head)[target] in nats, and whether the target is the likeliest id.

    Of ids that are equally likely the lowest counts as the likeliest.
    """
    head = head.astype(hidden.dtype)
    logits = jnp.einsum("td,dv->tv", hidden, head, preferred_element_type=jnp.float32)
    scores = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)[:, 0]
    return scores, jnp.argmax(logits, axis=1) == targets
