"""Sparse attention and its gradients on GPU."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.sparse_attention.gpu_keys import entry_gradient, key_gradient
from pallas_kernels.sparse_attention.gpu_queries import (
    Rows,
    attend,
    fitted,
    fitted_rows,
    query_gradient,
)
from pallas_kernels.sparse_attention.seen import Seen


def forward(
    q: Float[Array, "b t h k"], keys, entries, sink, seen: Seen, window: int
) -> tuple[Float[Array, "b t h k"], Float[Array, "b t h"]]:
    """Return output and logarithm of the softmax's total, as `sparse_attention` does."""
    h, k = q.shape[2:]
    x = fitted(q, keys, entries, sink, seen)
    out, log_total = attend(*x, window=window, scale=k**-0.5)
    return out[:, :, :h, :k], log_total[:, :, :h]


def gradients(
    q: Float[Array, "b t h k"], keys, entries, sink, seen: Seen, window: int,
    log_total: Float[Array, "b t h"], drop: Float[Array, "b t h"], grad: Float[Array, "b t h k"],
) -> tuple[Array, Array, Array | None]:
    """Return the gradients of q, keys and entries.

    Args:
      drop: what a logit's gradient loses by the softmax's total.
    """
    h, k = q.shape[2:]
    x, scale = fitted(q, keys, entries, sink, seen), k**-0.5
    rows = Rows(x.q, *map(fitted_rows, (grad, log_total, drop)))
    grad_q = query_gradient(rows, x.keys, x.entries, x.seen, window=window, scale=scale)
    grad_keys = key_gradient(rows, x.keys, x.seen, window=window, scale=scale)
    grad_entries = None
    if entries is not None:
        grad_entries = entry_gradient(rows, x.entries, x.seen, scale=scale)[:, :, :k]
    return grad_q[:, :, :h, :k], grad_keys[:, :, :k], grad_entries
