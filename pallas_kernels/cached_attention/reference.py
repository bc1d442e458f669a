"""What the kernels of cached attention compute, in plain JAX: every logit written out."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.cached_attention.index import Ring, sees_new


def cached_attention(
    q: Float[Array, "b t h k"], kv: Float[Array, "b t s k"], mask: Bool[Array, "b t s"],
    sink: Float[Array, " h"],
) -> Float[Array, "b t h k"]:
    """Attend each query to what the mask shows of its key-values: one softmax with the sink.

    z = q kv / sqrt(k), p = exp(z) / (sum exp(z) + exp(sink_h)), o = sum p kv

    Source: report 2.3; fact sheet 2.3.
    """
    logits = jnp.einsum("bthk,btsk->bths", q.astype(jnp.float32), kv) * q.shape[-1] ** -0.5
    logits = jnp.where(mask[:, :, None], logits, -jnp.inf)
    top = jnp.maximum(jnp.max(logits, axis=-1), sink)
    weights = jnp.exp(logits - top[..., None])
    total = jnp.sum(weights, axis=-1) + jnp.exp(sink - top)
    out = jnp.einsum("bths,btsk->bthk", weights, kv) / total[..., None]
    return out.astype(q.dtype)


def ring_mask(slots: int, start: Int[Array, " b"], tokens: int) -> Bool[Array, "b t s"]:
    """Return which slots of the ring each query sees."""
    place = jnp.arange(tokens)[:, None]
    return Ring(slots).sees(place, jnp.arange(slots), start[:, None, None])


def new_mask(rows: int, tokens: int) -> Bool[Array, "b t t"]:
    """Return which tokens of the call each query sees."""
    place = jnp.arange(tokens)
    return jnp.broadcast_to(sees_new(place[:, None], place), (rows, tokens, tokens))
