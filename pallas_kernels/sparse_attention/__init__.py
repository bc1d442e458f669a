"""Attention of V4's layers: a window of keys, compressed entries and a sink in one softmax.

One key-value vector of all heads serves as key and as value. A query sees the window of keys before
it and, in CSA and HCA layers, compressed entries: a range of them, or those that an indexer chose.
Kernels read these alone; no array of [tokens, tokens] or [tokens, entries] logits exists, and no
gathered copy of the entries.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.implementation import AUTO, XLA, choose
from pallas_kernels.sparse_attention import gpu, reference, tpu
from pallas_kernels.sparse_attention.seen import Seen, entry_mask
from pallas_kernels.target import GPU, TPU, target_platform

__all__ = ["Seen", "sparse_attention"]

KERNELS = {GPU: gpu, TPU: tpu}
WORTHWHILE = 64  # channels: fewer leave most of a kernel's tiles empty
MOST_HEADS, MOST_QUERIES = 128, 2**19


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def sparse_attention(
    q: Float[Array, "b t h k"], keys: Float[Array, "b s k"], entries: Float[Array, "b c k"] | None,
    sink: Float[Array, " h"], seen: Seen, window: int, implementation: str = AUTO,
) -> tuple[Float[Array, "b t h k"], Float[Array, "b t h"]]:
    """Attend each query to the keys and entries that it sees.

    z = q kv / sqrt(k), p = exp(z) / (sum exp(z) + exp(sink_h)), o = sum p kv

    Sums are float32; weights meet the values in the dtype of q.

    Args:
      keys: the queries' own and, in front of them, any number that were there before. With such
        there are no gradients.
      entries: compressed ones; None, as in window layers: there are none.
      seen: what queries see. `first` and `end` are wanted with `chosen`, too: chosen entries lie
        between them, and neither falls along a row.
      window: keys of its document that a query sees at most, its own included.
    Returns:
      o in the dtype of q, and log(sum exp(z) + exp(sink_h)), float32.
    Raises:
      ValueError: there is no such implementation, or the arrays do not fit together.
    Source: report 2.3; fact sheet 2.3 and 2.5.
    """
    _check(q, keys, entries, sink, seen)
    chosen = choose_for(q, implementation)
    if chosen == GPU and seen.chosen is None and seen.words is not None:
        raise ValueError(
            "sparse_attention: expected the numbers of chosen entries for the kernel of a GPU, got "
            "their bits"
        )
    if entries is not None and not entries.shape[1]:
        entries = None
    forward = _plain if chosen == XLA else KERNELS[chosen].forward
    return forward(q, keys, entries, sink, seen, window)


def choose_for(
    q: Float[Array, "b t h k"], implementation: str, *, worthwhile: bool = True
) -> str:
    """Return "xla", "gpu" or "tpu".

    Args:
      worthwhile: whether "auto" may take a kernel, if the queries are such that it pays.
    Raises:
      ValueError: there is no such implementation, or its kernels do not take these queries.
    """
    b, t, h, k = q.shape
    # A TPU holds two numbers of each block of 8 queries or more beside its program.
    fits = h <= MOST_HEADS and b * t <= MOST_QUERIES
    pays = k >= WORTHWHILE and q.dtype == jnp.bfloat16
    worthwhile = worthwhile and pays and (fits or target_platform() != TPU)
    chosen = choose("sparse_attention", implementation, worthwhile=worthwhile)
    if chosen == TPU and not fits:
        raise ValueError(
            f"sparse_attention: expected at most {MOST_HEADS} heads and {MOST_QUERIES} queries in "
            f"all for the kernel of a TPU, got {h} and {b} x {t}"
        )
    return chosen


def _check(q, keys, entries, sink, seen: Seen) -> None:
    b, t, h, k = q.shape
    s = max((t, *keys.shape[1:2]))
    wanted, found = [(b, s, k), (h,), (b, t)], [keys.shape, sink.shape, seen.first_key.shape]
    if entries is not None:
        wanted += [(b, *entries.shape[1:2], k), (b, t), (b, t)]
        found += [entries.shape, *(None if x is None else x.shape for x in (seen.first, seen.end))]
    if wanted != found:
        raise ValueError(
            "sparse_attention: expected q [b, t, h, k], keys [b, s, k], s from t on, sink [h], "
            "first_key [b, t] and, with entries [b, c, k], first and end [b, t]: for q "
            f"{q.shape} {wanted}, got {found}"
        )


def _plain(q, keys, entries, sink, seen: Seen, window: int):
    b, t = q.shape[:2]
    if entries is None:
        entries, mask = jnp.zeros((b, 0, q.shape[-1]), q.dtype), jnp.zeros((b, t, 0), bool)
    else:
        mask = entry_mask(seen, entries.shape[1])
    key_mask = reference.window_mask(seen.first_key, window, keys.shape[1] - t)
    return reference.sparse_attention(q, keys, entries, sink, key_mask, mask)


def _forward(q, keys, entries, sink, seen, window, implementation):
    if keys.shape[1] > q.shape[1]:
        raise ValueError(
            "sparse_attention: expected as many keys as queries, to be differentiated, got "
            f"{keys.shape[1]} keys of {q.shape[1]} queries"
        )
    out, log_total = sparse_attention(q, keys, entries, sink, seen, window, implementation)
    return (out, log_total), (q, keys, entries, sink, seen, out, log_total)


def _backward(window, implementation, kept, grads):
    q, keys, entries, sink, seen, out, log_total = kept
    chosen = choose_for(q, implementation)
    if chosen == XLA:
        _, pull_back = jax.vjp(
            lambda *operands: _plain(*operands, seen, window), q, keys, entries, sink
        )
        return *pull_back(grads), None
    grad, grad_total = grads
    # What a logit's gradient loses by the total, and gains where that is asked for itself.
    product = out.astype(jnp.float32) * grad.astype(jnp.float32)
    drop = jnp.sum(product, axis=-1) - grad_total
    some = None if entries is None or not entries.shape[1] else entries
    grad_q, grad_keys, grad_entries = KERNELS[chosen].gradients(
        q, keys, some, sink, seen, window, log_total, drop, grad
    )
    if some is None and entries is not None:
        grad_entries = jnp.zeros_like(entries)
    # The sink takes weight and gives no value.
    grad_sink = -jnp.sum(jnp.exp(sink - log_total) * drop, axis=(0, 1)).astype(sink.dtype)
    return grad_q, grad_keys, grad_entries, grad_sink, None


sparse_attention.defvjp(_forward, _backward)
