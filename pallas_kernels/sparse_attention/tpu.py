"""Sparse attention and its gradients on TPU."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.sparse_attention.seen import Seen
from pallas_kernels.sparse_attention.tpu_keys import Rows, entry_gradient, key_gradient
from pallas_kernels.sparse_attention.tpu_queries import (
    attend,
    blocks_of,
    fitted,
    fitted_rows,
    query_gradient,
)


def forward(
    q: Float[Array, "b t h k"], keys, entries, sink, seen: Seen, window: int
) -> tuple[Float[Array, "b t h k"], Float[Array, "b t h"]]:
    """Return output and logarithm of the softmax's total, as `sparse_attention` does."""
    _, t, h, k = q.shape
    blocks = blocks_of(h, window, keys.shape[1] - t)
    x = fitted(q, keys, entries, sink, seen, blocks)
    out, log_total = attend(x, blocks, k**-0.5)
    return out[:, :t, :h, :k], log_total[:, :t, :h]


def gradients(
    q: Float[Array, "b t h k"], keys, entries, sink, seen: Seen, window: int,
    log_total: Float[Array, "b t h"], drop: Float[Array, "b t h"], grad: Float[Array, "b t h k"],
) -> tuple[Array, Array, Array | None]:
    """Return the gradients of q, keys and entries.

    Args:
      drop: what a logit's gradient loses by the softmax's total.
    """
    _, t, h, k = q.shape
    blocks, scale = blocks_of(h, window), k**-0.5
    x = fitted(q, keys, entries, sink, seen, blocks)
    rows = Rows(*map(fitted_rows, (log_total, drop, grad)))
    grad_q = query_gradient(x, *rows, blocks, scale)[:, :t, :h, :k]
    grad_keys = key_gradient(x, rows, blocks, scale)[:, :t, :k]
    grad_entries = None
    if entries is not None:
        grad_entries = entry_gradient(x, rows, blocks, scale)[:, : entries.shape[1], :k]
    return grad_q, grad_keys, grad_entries
