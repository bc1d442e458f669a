"""Compression of blocks of tokens into entries: gated pooling fused with its normalisation.

The GPU kernel reads each value and gate of a block once, from wherever the block begins. What
follows, rotation and the rounding of a served cache, works element by element on entries, which are
fewer than tokens: it is left to XLA. There is no kernel for TPU.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.compressor import gpu, reference
from pallas_kernels.compressor.index import Block
from pallas_kernels.implementation import AUTO, XLA, choose
from pallas_kernels.target import GPU, target_platform


def pooled_entries(
    values: Float[Array, "b t *u k"], gates: Float[Array, "b t *u k"],
    bias: Float[Array, "ratio *u k"], norm: Float[Array, " k"],
    start: Int[Array, "b c"] | None = None, has_previous: Bool[Array, "b c"] | None = None, *,
    eps: float, implementation: str = AUTO,
) -> Float[Array, "b c k"]:
    """Return the normalised average of each entry's tokens, weighted by softmax(gates + bias).

    The softmax is of each channel, over the tokens of the entry's block. With two series (u = 2)
    it is over series 0 of the block before, where there is one, and series 1 of the entry's own.
    Computed in float32. Differentiable in the first four.

    Args:
      start: first token of each entry's block, whose tokens are all there; None: entry i starts at
        i * ratio. Blocks follow each other without overlap. An entry that begins less than `ratio`
        after the one before is none: it passes no gradient on.
      has_previous: the `ratio` tokens before are the block before; None: of all but the first.
    Raises:
      ValueError: there is no such implementation, or it does not take these arrays.
    """
    chosen = _choose(bias, implementation)
    ratio, k = bias.shape[0], bias.shape[-1]
    b, t = values.shape[:2]
    if start is None:
        start = jnp.broadcast_to(jnp.arange(t // ratio) * ratio, (b, t // ratio))
    if has_previous is None:
        has_previous = jnp.broadcast_to(jnp.arange(start.shape[1]) > 0, start.shape)
    values, gates = (x.astype(jnp.float32).reshape(b, t, -1, k) for x in (values, gates))
    bias, norm = bias.astype(jnp.float32).reshape(ratio, -1, k), norm.astype(jnp.float32)
    if chosen == XLA or not start.size:
        return reference.pooled_entries(values, gates, bias, norm, start, has_previous, eps)
    return _pooled_entries(values, gates, bias, norm, start, has_previous, eps)


def _choose(bias: Array, implementation: str) -> str:
    chosen = choose("compressor", implementation, worthwhile=target_platform() == GPU)
    if chosen not in (XLA, GPU):
        raise ValueError(f"compressor: expected implementation xla or gpu, got {chosen!r}")
    if chosen == GPU and (bias.shape[0] & (bias.shape[0] - 1) or bias.shape[-1] & (
        bias.shape[-1] - 1
    )):
        raise ValueError(
            "compressor: expected a position bias whose ratio and width are powers of two, got "
            f"{bias.shape}"
        )
    return chosen


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _pooled_entries(values, gates, bias, norm, start, has_previous, eps):
    return gpu.pooled_entries(values, gates, bias, norm, start, has_previous, eps)


def _forward(values, gates, bias, norm, start, has_previous, eps):
    operands = values, gates, bias, norm, start, has_previous
    return gpu.pooled_entries(*operands, eps), operands


def _backward(eps, operands, grad):
    values, gates, bias, norm, start, has_previous = operands
    exists = present(start, bias.shape[0])
    grad = jnp.where(exists[..., None], grad, 0)
    grad_values, grad_gates, grad_norm = gpu.gradients(*operands, exists, eps, grad)
    grad_bias = _grad_bias(grad_gates, Block(*bias.shape[:2]), start, has_previous, exists)
    grad_norm = jnp.sum(grad_norm, axis=(0, 1))
    return grad_values, grad_gates, grad_bias.reshape(bias.shape), grad_norm, None, None


_pooled_entries.defvjp(_forward, _backward)


def present(start: Int[Array, "b c"], ratio: int) -> Bool[Array, "b c"]:
    """Say which entries there are: slots past a row's last one do not begin after it."""
    latest = jax.lax.cummax(start, axis=1)
    before = jnp.pad(latest, ((0, 0), (1, 0)), constant_values=-ratio)[:, :-1]
    return start >= before + ratio


def _grad_bias(
    grad_gates: Float[Array, "b t u k"], block: Block, start: Int[Array, "b c"],
    has_previous: Bool[Array, "b c"], exists: Bool[Array, "b c"],
) -> Float[Array, "slots k"]:
    """Sum the gradients of gates over blocks: XLA fuses taking the rows with their sum."""
    slot = jnp.arange(block.slots)
    rows = block.row(start[..., None], slot)
    used = exists[..., None] & block.used(slot, has_previous[..., None])
    flat = grad_gates.reshape(grad_gates.shape[0], -1, grad_gates.shape[-1])
    taken = jax.vmap(lambda row, i: row[i])(flat, rows)
    sums = jnp.sum(jnp.where(used[..., None], taken, 0), axis=(0, 1))
    return jnp.zeros_like(sums).at[block.bias(slot)].set(sums)
