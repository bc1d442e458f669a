"""Cross-entropy of the tokens that follow, within their documents."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv4_jax.attention.layout import number_documents
from dsv4_jax.chunks import map_chunks
from dsv4_jax.shapes import Array, Float, Hidden, Int, Tokens


def shifted_targets(
    tokens: Tokens, segment_ids: Tokens | None, shift: int
) -> tuple[Int[Array, "b t"], Float[Array, "b t"]]:
    """Return the token `shift` places on and a weight: 1 where it is of the same document."""
    targets = jnp.pad(tokens, ((0, 0), (0, shift)))[:, shift:]
    if segment_ids is None:
        inside = jnp.arange(tokens.shape[1]) < tokens.shape[1] - shift
        return targets, jnp.broadcast_to(inside, tokens.shape).astype(jnp.float32)
    segment_ids = number_documents(segment_ids)
    later = jnp.pad(segment_ids, ((0, 0), (0, shift)))[:, shift:]
    return targets, ((later == segment_ids) & (segment_ids > 0)).astype(jnp.float32)


def token_nats(
    hidden: Hidden, head: Float[Array, "d v"], targets: Int[Array, "b t"],
    weights: Float[Array, "b t"],
) -> Float[Array, ""]:
    """Return the weighted sum of -log softmax(hidden head)[target], in nats.

    Logits exist for a stretch of tokens at a time, in float32.
    """

    def nats(stretch):
        hidden, targets = stretch
        logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    head = head.astype(hidden.dtype)
    return jnp.sum(weights * map_chunks(nats, (hidden, targets), hidden.shape[0] * head.shape[1]))


def next_token_loss(
    hidden: Hidden, head: Float[Array, "d v"], tokens: Tokens, segment_ids: Tokens | None = None
) -> Float[Array, ""]:
    """Return the mean cross-entropy of each token's successor in its document, nats per token.

    Where no token has a successor it is 0.
    """
    targets, weights = shifted_targets(tokens, segment_ids, 1)
    return token_nats(hidden, head, targets, weights) / jnp.maximum(jnp.sum(weights), 1)
