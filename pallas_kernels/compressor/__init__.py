"""Compression of blocks of tokens into entries: gated pooling, normalisation, rotation, rounding.

Each value and gate of a block is read once. A GPU's kernel reads them from wherever the block
begins. On TPU those that have a start each, as of packed documents, are gathered by XLA first;
blocks of rows that are one document each are read where they are.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.compressor import gpu, reference, tpu, tpu_backward
from pallas_kernels.compressor.form import Form, Operands
from pallas_kernels.implementation import AUTO, XLA, choose
from pallas_kernels.target import GPU, TPU

FORWARD = {GPU: gpu.forward, TPU: tpu.forward}
GRADIENTS = {GPU: gpu.gradients, TPU: tpu_backward.gradients}
DTYPES = ("bfloat16", "float32")
WORTHWHILE = 8  # entries: a TPU computes so many at once


def compress(
    values: Float[Array, "b t *u k"], gates: Float[Array, "b t *u k"],
    bias: Float[Array, "ratio *u k"], norm: Float[Array, " k"], cos: Float[Array, "b c h"],
    sin: Float[Array, "b c h"], start: Int[Array, "b c"] | None = None,
    has_previous: Bool[Array, "b c"] | None = None, *, eps: float, dtype, rounded: bool = False,
    implementation: str = AUTO,
) -> Float[Array, "b c k"]:
    """Return the normalised, rotated average of each entry's tokens: see `reference`.

    The average is weighted by softmax(gates + bias) of each channel, over the tokens of the entry's
    block. With two series (u = 2) it is over series 0 of the block before, where there is one, and
    series 1 of the entry's own. Differentiable in the first four, computed in float32.

    Args:
      cos, sin: of the angle of each pair of channels at each entry; the last 2h channels are
        rotated.
      start: first token of each entry's block, whose tokens are all there; None: entry i starts at
        i * ratio. Blocks follow each other without overlap. An entry that begins less than `ratio`
        after the one before is none: it passes no gradient on.
      has_previous: the `ratio` tokens before are a block, that of the entry before; None: for all
        entries but the first.
      rounded: round channels that are not rotated to FP8 (E4M3) in groups of 64 under a power of
        two, the others to bfloat16; the gradient is as if this was not done.
    Returns:
      Entries of `dtype`, to which they are rounded before and after the rotation.
    Raises:
      ValueError: there is no such implementation, or it does not take these arrays.
    """
    chosen = choose_for(cos.shape[1], dtype, implementation)
    _check(values, gates, bias, norm, cos, sin, start, has_previous)
    ratio, k = bias.shape[0], bias.shape[-1]
    (b, t), c = values.shape[:2], cos.shape[1]
    values, gates = (x.astype(jnp.float32).reshape(b, t, -1, k) for x in (values, gates))
    bias, norm = bias.astype(jnp.float32).reshape(ratio, -1, k), norm.astype(jnp.float32)
    exists = jnp.ones((b, c), bool) if start is None else present(start, ratio)
    if start is not None and chosen == TPU and c:
        values, gates = (_gathered(x, start, ratio) for x in (values, gates))
    if start is None:
        start = jnp.broadcast_to(jnp.arange(c) * ratio, (b, c))
    if has_previous is None:
        has_previous = jnp.broadcast_to(jnp.arange(c) > 0, (b, c))
    form = Form(eps, jnp.dtype(dtype).name, rounded)
    x = Operands(values, gates, bias, norm, cos, sin, start, has_previous, exists)
    if chosen == XLA or not start.size:
        return reference.compress(*x[:-1], *form)
    return _compress(chosen, form, x)


def choose_for(entries: int, dtype, implementation: str, *, worthwhile: bool = True) -> str:
    """Return "xla", "gpu" or "tpu", for entries of this number and dtype.

    Args:
      worthwhile: whether "auto" may take a kernel, if the entries are such that it pays.
    Raises:
      ValueError: there is no such implementation, or it has no entries of this dtype.
    """
    fits = jnp.dtype(dtype).name in DTYPES
    worthwhile = worthwhile and entries >= WORTHWHILE and fits
    chosen = choose("compressor", implementation, worthwhile=worthwhile)
    if chosen != XLA and not fits:
        raise ValueError(
            f"compressor: expected a dtype of {' or '.join(DTYPES)}, got {jnp.dtype(dtype).name}"
        )
    return chosen


def present(start: Int[Array, "b c"], ratio: int) -> Bool[Array, "b c"]:
    """Say which entries there are: slots past a row's last one do not begin after it."""
    latest = jax.lax.cummax(start, axis=1)
    before = jnp.pad(latest, ((0, 0), (1, 0)), constant_values=-ratio)[:, :-1]
    return start >= before + ratio


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _compress(chosen: str, form: Form, x: Operands) -> Float[Array, "b c k"]:
    return FORWARD[chosen](x, form)


def _forward(chosen, form, x):
    return FORWARD[chosen](x, form), x


def _backward(chosen, form, x: Operands, grad):
    grad = jnp.where(x.exists[..., None], grad, 0)
    grads = GRADIENTS[chosen](x, grad, form)
    return (Operands(*grads, *[None] * (len(x) - len(grads))),)


_compress.defvjp(_forward, _backward)


def _gathered(x: Float[Array, "b t u k"], start: Int[Array, "b c"], ratio: int) -> Array:
    """Put the tokens of all blocks one after another."""
    index = (start[..., None] + jnp.arange(ratio)).reshape(start.shape[0], -1)
    return jax.vmap(lambda row, i: row[i])(x, index)


def _check(values, gates, bias, norm, cos, sin, start, has_previous) -> None:
    k, (b, t), (_, c, angles) = bias.shape[-1], values.shape[:2], cos.shape
    wanted = [(b, t, *bias.shape[1:])] * 2 + [(k,), (b, c, angles), (b, c, angles)]
    found = [x.shape for x in (values, gates, norm, cos, sin)]
    for x in (start, has_previous):
        if x is not None:
            wanted.append((b, c))
            found.append(x.shape)
    fits = bias.ndim == 2 or (bias.ndim == 3 and bias.shape[1] in (1, 2))
    if wanted != found or not fits or not 0 < 2 * angles <= k or (
        start is None and c * bias.shape[0] > t
    ):
        raise ValueError(
            "compressor: expected values and gates [b, t, (u,) k] and bias [ratio, (u,) k] with u "
            "of 1 or 2, norm [k], cos and sin [b, c, h] of 1 to k / 2 angles, start and "
            "has_previous [b, c] and tokens for c entries: for bias "
            f"{bias.shape} {wanted}, got {found}"
        )
