"""What the kernels of hyper-connections compute, in plain JAX.

A token has n streams. A sublayer reads one vector u from them and writes its result y back, by
three gates that the streams themselves determine: pre (what is read), post (what is written) and
comb (how the streams mix).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Streams = Float[Array, "b t n d"]
Hidden = Float[Array, "b t d"]
Post = Float[Array, "n b t"]
Comb = Float[Array, "n m b t"]


def read_streams(
    streams: Streams, fn: Float[Array, "d n r"], scale: Float[Array, "3"],
    base: Float[Array, " r"], *, rms_eps: float, hc_eps: float, iterations: int,
) -> tuple[Hidden, Post, Comb]:
    """Compute the gates of a sublayer and what it reads, u = sum_n pre_n X_n.

    Args:
      fn: for each gate, r = 2n + n n of them, its weights: first those of pre, then post, then
        comb row by row.
    """
    n, x = streams.shape[2], streams.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=(2, 3)) + rms_eps)
    logits = jnp.einsum("btnd,dnr->rbt", x, fn, precision="highest") * inverse
    base = base[:, None, None]
    pre = jax.nn.sigmoid(logits[:n] * scale[0] + base[:n]) + hc_eps
    post = 2 * jax.nn.sigmoid(logits[n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = (logits[2 * n :] * scale[2] + base[2 * n :]).reshape(n, n, *logits.shape[1:])
    comb = sinkhorn(jax.nn.softmax(comb, axis=1) + hc_eps, hc_eps, iterations)
    u = jnp.einsum("nbt,btnd->btd", pre, x, precision="highest")
    return u.astype(streams.dtype), post, comb


def sinkhorn(matrix: Comb, eps: float, iterations: int) -> Comb:
    """Divide by the sums of columns (over n) and rows (over m) in turn, by columns at last."""

    def columns(x):
        return x / (jnp.sum(x, axis=0, keepdims=True) + eps)

    def step(_, x):
        return columns(x / (jnp.sum(x, axis=1, keepdims=True) + eps))

    return jax.lax.fori_loop(0, iterations - 1, step, columns(matrix))


def write_streams(streams: Streams, y: Hidden, post: Post, comb: Comb) -> Streams:
    """Mix the streams and write to them: X'_m = post_m y + sum_n comb[n, m] X_n."""
    mixed = jnp.einsum(
        "nmbt,btnd->btmd", comb, streams.astype(jnp.float32), precision="highest"
    )
    written = jnp.einsum("mbt,btd->btmd", post, y.astype(jnp.float32))
    return (mixed + written).astype(streams.dtype)


def write_and_read(
    streams: Streams, y: Hidden, post: Post, comb: Comb, fn: Float[Array, "d n r"],
    scale: Float[Array, "3"], base: Float[Array, " r"], *,
    rms_eps: float, hc_eps: float, iterations: int,
) -> tuple[Streams, Hidden, Post, Comb]:
    """Write what a sublayer returned, then read for the next, whose weights are given."""
    streams = write_streams(streams, y, post, comb)
    read = read_streams(
        streams, fn, scale, base, rms_eps=rms_eps, hc_eps=hc_eps, iterations=iterations
    )
    return streams, *read
