"""Manifold-constrained hyper-connections: what a sublayer reads from a token's streams and writes.

`write_and_read` is the step between two sublayers: it touches the streams once.

Streams are [b, t, n, d] or, equally, [b, t, n d], in which form they are returned as well. A TPU
stores these differently: with the streams apart they are copied before and after each kernel,
unless one call's result is the next one's argument.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.implementation import AUTO, XLA, choose
from pallas_kernels.mhc import gpu, gpu_backward, reference, tpu, tpu_backward
from pallas_kernels.mhc.gates import Gating, inverse_norm
from pallas_kernels.target import GPU, TPU

OPERATION = "mhc"
FORWARD = {GPU: gpu.forward, TPU: tpu.forward}
BACKWARD = {GPU: gpu_backward.backward, TPU: tpu_backward.backward}
DTYPES = ("bfloat16", "float32")
MOST_STREAMS = 4  # three parts of 2n + n n weights fit into the 128 lanes of a TPU
# Tokens from which a kernel should pay: an estimate. Each call lays the weights of the gates out
# anew: for a column of 4 streams 96 bytes are read, about 200 written and read again, as many as
# 250 tokens have there in bfloat16.
WORTHWHILE = 256

Streams = Float[Array, "b t n d"] | Float[Array, "b t columns"]
Hidden = Float[Array, "b t d"]
Post = Float[Array, "n b t"]
Comb = Float[Array, "n m b t"]


def read_streams(
    streams: Streams, fn: Float[Array, "d n r"], scale: Float[Array, "3"],
    base: Float[Array, " r"], *, rms_eps: float, hc_eps: float, iterations: int,
    implementation: str = AUTO,
) -> tuple[Hidden, Post, Comb]:
    """Compute a sublayer's gates and what it reads: see `reference.read_streams`.

    Raises:
      ValueError: there is no such implementation, or it cannot do what is asked for.
    """
    chosen = choose_for(streams, fn.shape[1], implementation)
    apart = _apart(streams, fn.shape[1])
    options = {"rms_eps": rms_eps, "hc_eps": hc_eps, "iterations": iterations}
    if chosen == XLA:
        return reference.read_streams(apart, fn, scale, base, **options)
    gating = Gating(fn.shape[1], fn.shape[0], **options)
    _check(apart, gating, fn, scale, base)
    return _run(chosen, gating, streams, None, (fn, scale, base))


def write_streams(
    streams: Streams, y: Hidden, post: Post, comb: Comb, *, implementation: str = AUTO
) -> Streams:
    """Mix the streams and write y to them: see `reference.write_streams`.

    Raises:
      ValueError: there is no such implementation, or it cannot do what is asked for.
    """
    chosen = choose_for(streams, post.shape[0], implementation)
    apart = _apart(streams, post.shape[0])
    if chosen == XLA:
        return reference.write_streams(apart, y, post, comb).reshape(streams.shape)
    gating = Gating(post.shape[0], y.shape[-1], 0.0, 0.0, 1)
    _check(apart, gating)
    return _run(chosen, gating, streams, (y, post, comb), None)[0]


def write_and_read(
    streams: Streams, y: Hidden, post: Post, comb: Comb, fn: Float[Array, "d n r"],
    scale: Float[Array, "3"], base: Float[Array, " r"], *, rms_eps: float, hc_eps: float,
    iterations: int, implementation: str = AUTO,
) -> tuple[Streams, Hidden, Post, Comb]:
    """Write for one sublayer and read for the next: see `reference.write_and_read`.

    Raises:
      ValueError: there is no such implementation, or it cannot do what is asked for.
    """
    chosen = choose_for(streams, fn.shape[1], implementation)
    apart = _apart(streams, fn.shape[1])
    options = {"rms_eps": rms_eps, "hc_eps": hc_eps, "iterations": iterations}
    if chosen == XLA:
        new, *read = reference.write_and_read(apart, y, post, comb, fn, scale, base, **options)
        return new.reshape(streams.shape), *read
    gating = Gating(fn.shape[1], fn.shape[0], **options)
    _check(apart, gating, fn, scale, base)
    return _run(chosen, gating, streams, (y, post, comb), (fn, scale, base))


def choose_for(
    streams: Streams, n: int, implementation: str, *, worthwhile: bool = True
) -> str:
    """Return "xla", "gpu" or "tpu".

    Args:
      n: how many streams there are.
      worthwhile: whether "auto" may take a kernel, if the streams are such that it pays.
    Raises:
      ValueError: there is no such implementation.
    """
    b, t = streams.shape[:2]
    width = math.prod(streams.shape[2:]) // n
    worthwhile = (
        worthwhile and streams.dtype == jnp.bfloat16 and b * t >= WORTHWHILE
        and n <= MOST_STREAMS and width % tpu.LANES == 0  # others are filled up: a copy
    )
    return choose(OPERATION, implementation, worthwhile=worthwhile)


def _apart(streams: Streams, n: int) -> Float[Array, "b t n d"]:
    return streams if streams.ndim == 4 else streams.reshape(*streams.shape[:2], n, -1)


def _check(streams, gating: Gating, *weights) -> None:
    """Refuse what a kernel cannot do."""
    if streams.dtype.name not in DTYPES:
        raise ValueError(
            f"{OPERATION}: expected streams in {' or '.join(DTYPES)}, got {streams.dtype.name}"
        )
    if not 1 <= gating.streams <= MOST_STREAMS:
        raise ValueError(
            f"{OPERATION}: expected 1 to {MOST_STREAMS} streams, got {gating.streams}"
        )
    if streams.shape[2:] != (gating.streams, gating.width):
        raise ValueError(
            f"{OPERATION}: expected {gating.streams} streams of width {gating.width}, got "
            f"{streams.shape[2]} of width {streams.shape[3]}"
        )
    wanted = (gating.width, gating.streams, gating.logits), (3,), (gating.logits,)
    for name, array, shape in zip(("fn", "scale", "base"), weights, wanted, strict=False):
        if array.shape != shape:
            raise ValueError(f"{OPERATION}: expected {name} of shape {shape}, got {array.shape}")
    if weights and gating.rms_eps <= 0:
        raise ValueError(f"{OPERATION}: expected rms_eps above 0, got {gating.rms_eps}")
    if gating.iterations < 1:
        raise ValueError(f"{OPERATION}: expected iterations of 1 or more, got {gating.iterations}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(chosen: str, gating: Gating, streams, written, mixing):
    """Run the kernels of a platform.

    Args:
      written: y, post and comb, or None.
      mixing: fn, scale and base, or None.
    Returns:
      The new streams, u, post and comb: of these what was asked for.
    """
    return _forward(chosen, gating, streams, written, mixing)[0]


def _forward(chosen, gating, streams, written, mixing):
    results = list(FORWARD[chosen](
        _tokens(streams, gating), _flat_written(written), _flat_mixing(mixing), gating
    ))
    kept = None if mixing is None else results.pop()
    batch = streams.shape[:2]
    done = []
    if written is not None:
        done.append(results.pop(0).reshape(streams.shape))
    if mixing is not None:
        u, gates = results
        done += [u.reshape(*batch, -1), *_gates_apart(gates, batch, gating.streams)]
    return tuple(done), (streams, written, mixing, kept)


def _backward(chosen, gating, saved, grads):
    streams, written, mixing, kept = saved
    grads, batch = list(grads), streams.shape[:2]
    flat = [] if written is None else [_tokens(grads.pop(0), gating)]
    if mixing is not None:
        u, post, comb = grads
        flat += [_flat(u), _gates_together(post, comb)]
    results = list(BACKWARD[chosen](
        _tokens(streams, gating), _flat_written(written), _flat_mixing(mixing), kept,
        tuple(flat), gating,
    ))
    in_streams = results.pop(0).reshape(streams.shape)
    if written is not None:
        in_gates = _gates_apart(results.pop(1), batch, gating.streams)
        in_gates = [g.astype(x.dtype) for g, x in zip(in_gates, written[1:], strict=True)]
        written = results.pop(0).reshape(*batch, -1), *in_gates
    if mixing is not None:
        fn, scale, base = mixing
        in_fn, values = results
        in_scale, in_base = _affine_gradient(values, kept, gating)
        mixing = (
            in_fn.swapaxes(0, 1).astype(fn.dtype), in_scale.astype(scale.dtype),
            in_base.astype(base.dtype),
        )
    return in_streams, written, mixing


_run.defvjp(_forward, _backward)


def _affine_gradient(values, kept, gating: Gating) -> tuple[Array, Array]:
    """Return the gradients of scale and base: sums over 24 numbers of a token, left to XLA.

    Args:
      values: the gradient in what the gates' sigmoids and softmax took.
    """
    n = gating.streams
    logits = kept[:-1] * inverse_norm(kept[-1], gating)
    by_gate = jnp.sum(values * logits, axis=1)
    by_kind = by_gate[:n], by_gate[n : 2 * n], by_gate[2 * n :]
    return jnp.stack([jnp.sum(kind) for kind in by_kind]), jnp.sum(values, axis=1)


def _tokens(streams: Streams, gating: Gating) -> Float[Array, "tokens n d"]:
    return streams.reshape(-1, gating.streams, gating.width)


def _flat(x: Float[Array, "b t ..."]) -> Float[Array, "tokens ..."]:
    return x.reshape(-1, *x.shape[2:])


def _gates_together(post: Post, comb: Comb) -> Float[Array, "g tokens"]:
    gates = [post.reshape(post.shape[0], -1), comb.reshape(post.shape[0] ** 2, -1)]
    return jnp.concatenate(gates).astype(jnp.float32)


def _gates_apart(gates: Float[Array, "g tokens"], batch, n: int) -> tuple[Post, Comb]:
    return gates[:n].reshape(n, *batch), gates[n:].reshape(n, n, *batch)


def _flat_written(written):
    if written is None:
        return None
    y, post, comb = written
    return _flat(y), _gates_together(post, comb)


def _flat_mixing(mixing):
    if mixing is None:
        return None
    fn, scale, base = (x.astype(jnp.float32) for x in mixing)
    return fn.swapaxes(0, 1), jnp.concatenate([scale, base])
