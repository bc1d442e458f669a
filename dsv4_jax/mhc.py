"""Manifold-constrained hyper-connections: read from and write to the residual streams."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv4_jax.config import ModelConfig, Runtime
from dsv4_jax.layers import project
from dsv4_jax.params import Init, constant, param
from dsv4_jax.shapes import Array, Float, Hidden, Streams
from pallas_kernels import mhc as kernels
from pallas_kernels.implementation import XLA

# Initial offsets of the static gates. A sublayer starts out reading and writing mostly one
# stream, its own; the next sublayer takes the next stream. That breaks the symmetry of the
# streams, which all start as the same embedding and would stay equal under uniform gates, while
# the mean over streams still follows an ordinary residual network. The mixing matrix starts
# near the identity, so that streams keep what was written to them.
OWN_STREAM, OTHER_STREAM = 1.0, -1.0
COMB_DIAGONAL = 3.0


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def sinkhorn(
    matrix: Float[Array, "n m b t"], iterations: int, eps: float
) -> Float[Array, "n m b t"]:
    """Normalise columns and rows in turn until each sums to one.

    M / (sum_n M + eps), then (iterations - 1) times M / (sum_m M + eps), M / (sum_n M + eps):
    it ends on the columns, whose sums are exact. Tokens lie on the last axes, where the small
    matrices would otherwise waste vector lanes. Elements must be above 0.

    Source: report 2.2; fact sheet 2.2.
    """

    def step(_, x):
        return _normalise(_normalise(x, ROWS, eps)[0], COLUMNS, eps)[0]

    return jax.lax.fori_loop(0, iterations - 1, step, _normalise(matrix, COLUMNS, eps)[0])


COLUMNS, ROWS = 0, 1  # the axis that a column's and a row's sum runs over


def _normalise(x: Array, axis: int, eps: float) -> tuple[Array, Array]:
    total = jnp.sum(x, axis=axis, keepdims=True) + eps
    return x / total, total


def _sinkhorn_forward(matrix, iterations, eps):
    return sinkhorn(matrix, iterations, eps), matrix


def _sinkhorn_backward(iterations, eps, matrix, grad):
    """Run the iteration again, keeping the sums alone, then undo it step by step.

    With y = x / (sum x + eps) and G = dL/dlog y, the gradient of L in log x is G - y sum(G). Each
    x is y times its sums. Every step removes what normalising cancels, so that rounding does not
    grow: element by element the error was that of plain differentiation or less where it was
    measured. Nothing of the forward pass is stored but its input.
    """

    def forward(x, _):
        x, row_sums = _normalise(x, ROWS, eps)
        x, column_sums = _normalise(x, COLUMNS, eps)
        return x, (row_sums, column_sums)

    def backward(state, sums):
        x, log_grad = state
        row_sums, column_sums = sums
        x = x * column_sums
        log_grad = log_grad - x * jnp.sum(log_grad, axis=ROWS, keepdims=True)
        x = x * row_sums
        log_grad = log_grad - x * jnp.sum(log_grad, axis=COLUMNS, keepdims=True)
        return (x, log_grad), None

    x = _normalise(matrix, COLUMNS, eps)[0]
    x, sums = jax.lax.scan(forward, x, None, length=iterations - 1)
    # The last step first, before the factor x: a large common part of grad cancels exactly.
    log_grad = x * (grad - jnp.sum(grad * x, axis=COLUMNS, keepdims=True))
    (_, log_grad), _ = jax.lax.scan(backward, (x, log_grad), sums, reverse=True)
    return (log_grad / matrix,)


sinkhorn.defvjp(_sinkhorn_forward, _sinkhorn_backward)


def sinkhorn_error(comb: Float[Array, "n m b t"]) -> Float[Array, ""]:
    """Return how far matrices are from doubly stochastic: max |sum - 1| of rows and columns.

    The maximum is over all tokens, padding included, and has no gradient. `sinkhorn` ends on the
    columns, which are 1 to about eps: what shows is the rows. 20 rounds leave there 3e-2 at most
    and 3e-4 on average at logits of deviation 2.

    Source: fact sheet 2.2.
    """
    comb = jax.lax.stop_gradient(comb)
    sums = jnp.stack([jnp.sum(comb, axis=axis) for axis in (COLUMNS, ROWS)])
    return jnp.max(jnp.abs(sums - 1))


def mix_logits(
    streams: Streams, fn: Float[Array, "d n x"], eps: float, runtime: Runtime
) -> Float[Array, "x b t"]:
    """Project a token's streams, jointly normalised to unit mean square."""
    streams = streams.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(streams * streams, axis=(2, 3)) + eps)
    logits = project("btnd,dnx->btx", streams, fn, runtime, precision="highest")
    return jnp.moveaxis(logits * scale[..., None], -1, 0)


def collapse(streams: Streams, pre: Float[Array, "n b t"]) -> Hidden:
    """Read one vector from the streams: u = sum_n pre_n X_n, in float32."""
    return jnp.einsum("nbt,btnd->btd", pre, streams.astype(jnp.float32)).astype(streams.dtype)


def expand(
    streams: Streams, y: Hidden, post: Float[Array, "n b t"], comb: Float[Array, "n m b t"]
) -> Streams:
    """Mix the streams and write the sublayer's output: X'_m = post_m y + sum_n comb[n, m] X_n.

    Source: report 2.2. The sum runs over the first index of comb, whose columns sum to one.
    """
    mixed = jnp.einsum("nmbt,btnd->btmd", comb, streams.astype(jnp.float32))
    written = jnp.einsum("mbt,btd->btmd", post, y.astype(jnp.float32))
    return (mixed + written).astype(streams.dtype)


@functools.cache
def own_stream_init(stream: int) -> Init:
    """Favour one of the streams on the last axis."""

    def init(key, shape, dtype):
        own = jnp.arange(shape[-1]) == stream
        return jnp.broadcast_to(jnp.where(own, OWN_STREAM, OTHER_STREAM), shape).astype(dtype)

    return init


def diagonal_init(key, shape, dtype):
    """Favour the diagonal of the last two axes."""
    return jnp.broadcast_to(COMB_DIAGONAL * jnp.eye(shape[-1]), shape).astype(dtype)


class Write(NamedTuple):
    """What a sublayer has returned, and how it goes to the streams: see `expand`."""

    y: Hidden
    post: Float[Array, "n b t"]
    comb: Float[Array, "n m b t"]


class Residual(NamedTuple):
    """The streams, and what the next sublayer is to write to them before it reads.

    Where kernels run, a sublayer leaves its own write to the next one: a kernel does both and
    touches the streams once. Streams are side by side then, [b, t, n d]: a TPU would copy others.
    """

    streams: Streams | Float[Array, "b t columns"]
    pending: Write | None = None


def start(streams: Streams, config: ModelConfig, runtime: Runtime) -> Residual:
    """Begin with streams to which nothing is to be written."""
    if _implementation(streams, config, runtime) != XLA:
        streams = streams.reshape(*streams.shape[:2], -1)
    return Residual(streams)


def leave(
    streams: Array, write: Write, config: ModelConfig, runtime: Runtime
) -> Residual:
    """Leave a sublayer's write to the next one, if a kernel is to do both; else write now.

    What is pending between layers would be kept for the backward pass beside the streams.
    """
    residual = Residual(streams, write)
    if _implementation(streams, config, runtime) != XLA:
        return residual
    return Residual(finish(residual, config, runtime))


def before_scan(residual: Residual, config: ModelConfig, runtime: Runtime) -> Residual:
    """Have a write pending if layers leave theirs: a scan's carry does not change its form.

    One that changes nothing, if there was none.
    """
    kernel = _implementation(residual.streams, config, runtime) != XLA
    if residual.pending is not None or not kernel:
        return residual
    (b, t), n = residual.streams.shape[:2], config.hc_mult
    y = jnp.zeros((b, t, config.hidden_size), residual.streams.dtype)
    comb = jnp.broadcast_to(jnp.eye(n)[:, :, None, None], (n, n, b, t))
    return residual._replace(pending=Write(y, jnp.zeros((n, b, t)), comb))


def finish(residual: Residual, config: ModelConfig, runtime: Runtime) -> Streams:
    """Write what is pending and return the streams."""
    streams, pending = residual
    if pending is not None:
        chosen = _implementation(streams, config, runtime)
        if chosen == XLA:
            return expand(streams, *pending)
        streams = kernels.write_streams(streams, *pending, implementation=chosen)
    return streams.reshape(*streams.shape[:2], config.hc_mult, config.hidden_size)


def _implementation(streams: Array, config: ModelConfig, runtime: Runtime) -> str:
    """Return what mixes the streams, in all layers alike.

    Whether a kernel pays depends on the number of tokens, which must not change a row's bits where
    these are to be the same in any batch.
    """
    return kernels.choose_for(
        streams, config.hc_mult, runtime.implementation("mhc"),
        worthwhile=not runtime.batch_invariant,
    )


class StreamMix(nn.Module):
    """What one sublayer reads, by gates of its own, which also say how it will write."""

    config: ModelConfig
    runtime: Runtime
    own_stream: int  # the stream this sublayer mostly uses at initialisation

    def __call__(self, residual: Residual) -> tuple[Array, Hidden, Array, Array]:
        """Write what is pending, then read.

        Returns:
          The streams, what is read of them, and post and comb for the sublayer's own write.
        """
        c = self.config
        chosen = _implementation(residual.streams, c, self.runtime)
        if chosen == XLA:
            streams = finish(residual, c, self.runtime)
            pre, post, comb = self.gates(streams)
            return streams, collapse(streams, pre), post, comb
        options = {
            "rms_eps": c.rms_norm_eps, "hc_eps": c.hc_eps, "iterations": c.hc_sinkhorn_iters,
            "implementation": chosen,
        }
        streams, pending = residual
        if pending is None:
            return streams, *kernels.read_streams(streams, *self.weights(), **options)
        return kernels.write_and_read(streams, *pending, *self.weights(), **options)

    def gates(self, streams: Streams) -> tuple[Array, Array, Array]:
        """Return pre [n, b, t], post [n, b, t] and comb [n, m, b, t], float32."""
        c, n = self.config, self.config.hc_mult
        fn, scale, base = self.weights()
        base = base[:, None, None]
        logits = mix_logits(streams, fn, c.rms_norm_eps, self.runtime)
        pre = jax.nn.sigmoid(logits[:n] * scale[0] + base[:n]) + c.hc_eps
        post = 2 * jax.nn.sigmoid(logits[n : 2 * n] * scale[1] + base[n : 2 * n])
        comb = logits[2 * n :] * scale[2] + base[2 * n :]
        comb = jax.nn.softmax(comb.reshape(n, n, *logits.shape[1:]), axis=1) + c.hc_eps
        return pre, post, sinkhorn(comb, c.hc_sinkhorn_iters, c.hc_eps)

    @nn.compact
    def weights(self) -> tuple[Float[Array, "d n x"], Float[Array, " 3"], Float[Array, " x"]]:
        """Return fn, scale and base: those of pre, of post and, row by row, of comb."""
        d, n = self.config.hidden_size, self.config.hc_mult
        fn_pre = param(self, "fn_pre", "width streams -> mix", (d, n, n), exact=True)
        fn_post = param(self, "fn_post", "width streams -> mix", (d, n, n), exact=True)
        fn_comb = param(self, "fn_comb", "width streams -> mix mix_in", (d, n, n, n), exact=True)
        base_pre = param(self, "base_pre", "mix", (n,), own_stream_init(self.own_stream % n))
        base_post = param(self, "base_post", "mix", (n,), own_stream_init(self.own_stream % n))
        base_comb = param(self, "base_comb", "mix mix_in", (n, n), diagonal_init)
        scale = param(self, "scale", "gate", (3,), constant(self.config.hc_gate_init))
        fn = jnp.concatenate([fn_pre, fn_post, fn_comb.reshape(d, n, n * n)], axis=-1)
        return fn, scale, jnp.concatenate([base_pre, base_post, base_comb.reshape(-1)])


class StreamHead(nn.Module):
    """Collapse the streams into the vector that the final norm and the head read."""

    config: ModelConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, streams: Streams) -> Hidden:
        c, n, d = self.config, self.config.hc_mult, streams.shape[-1]
        fn = param(self, "fn", "width streams -> mix", (d, n, n), exact=True)
        base = param(self, "base", "mix", (n,), nn.initializers.zeros)
        scale = param(self, "scale", "gate", (1,), constant(c.hc_gate_init))
        logits = mix_logits(streams, fn, c.rms_norm_eps, self.runtime)
        weight = jax.nn.sigmoid(logits * scale[0] + base[:, None, None]) + c.hc_eps
        return collapse(streams, weight)
