"""What the kernels of sparse attention compute, in plain JAX: every logit written out."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def sparse_attention(
    q: Float[Array, "b t h k"], keys: Float[Array, "b s k"], entries: Float[Array, "b c k"],
    sink: Float[Array, " h"], key_mask: Bool[Array, "b t s"], entry_mask: Bool[Array, "b t c"],
) -> tuple[Float[Array, "b t h k"], Float[Array, "b t h"]]:
    """Attend queries to what the masks show of keys and entries: one softmax with the sink.

    z = q kv / sqrt(k), p = exp(z) / (sum exp(z) + exp(sink_h)), o = sum p kv

    Returns o in the dtype of q and log(sum exp(z) + exp(sink_h)), float32.

    Source: report 2.3; fact sheet 2.3.
    """
    kv = jnp.concatenate([keys, entries], axis=1).astype(jnp.float32)
    mask = jnp.concatenate([key_mask, entry_mask], axis=2)[:, :, None]
    logits = jnp.einsum("bthk,bsk->bths", q.astype(jnp.float32), kv) * q.shape[-1] ** -0.5
    logits = jnp.where(mask, logits, -jnp.inf)
    top = jnp.maximum(jnp.max(logits, axis=-1), sink)
    weights = jnp.exp(logits - top[..., None])
    total = jnp.sum(weights, axis=-1) + jnp.exp(sink - top)
    out = jnp.einsum("bths,bsk->bthk", weights, kv) / total[..., None]
    return out.astype(q.dtype), top + jnp.log(total)


def window_mask(
    first_key: Int[Array, "b t"], window: int, before: int = 0
) -> Bool[Array, "b t s"]:
    """Return the keys of the last `window` tokens, the own included, from `first_key` on.

    Args:
      before: keys in front of the first query's own.
    """
    key = jnp.arange(before + first_key.shape[1])
    query = key[before:, None]
    return (key <= query) & (key > query - window) & (key >= first_key[..., None])


def range_mask(
    first: Int[Array, "b t"], end: Int[Array, "b t"], entries: int
) -> Bool[Array, "b t c"]:
    """Return the entries from `first` to before `end`."""
    number = jnp.arange(entries)
    return (number >= first[..., None]) & (number < end[..., None])


def chosen_mask(chosen: Int[Array, "b t l"], entries: int) -> Bool[Array, "b t c"]:
    """Return the entries of the given numbers; a negative one is none."""
    return jnp.any(chosen[..., None] == jnp.arange(entries), axis=2)
