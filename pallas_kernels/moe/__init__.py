"""The routed experts of a mixture: each token's few of many SwiGLU layers, without dropping any.

Rows are sorted by expert and fill whole blocks of one expert each, which kernels multiply with that
expert's weights.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.blocks import pad_axes
from pallas_kernels.implementation import AUTO, XLA, choose
from pallas_kernels.moe import gpu, reference, tpu
from pallas_kernels.moe.formats import Fp4
from pallas_kernels.moe.fp4 import routed_experts_fp4
from pallas_kernels.moe.plan import block_rows, combine, make_plan, shares

__all__ = ["Fp4", "routed_experts", "routed_experts_fp4"]

KERNELS = {"gpu": gpu, "tpu": tpu}


def routed_experts(
    x: Float[Array, "t d"], experts: Int[Array, "t a"], weights: Float[Array, "t a"],
    gate: Float[Array, "e d f"], up: Float[Array, "e d f"], down: Float[Array, "e f d"], *,
    limit: float, implementation: str = AUTO,
) -> Float[Array, "t d"]:
    """Return the weighted sum of each token's experts, in the dtype of x.

    Products are of x's dtype, summed in float32; the hidden layer, which a choice's weight
    multiplies, and the output of each choice are rounded to it once.

    Args:
      experts: ids from 0 on; one outside of 0...e-1 stands for none.
      limit: of the SwiGLU: gate is at most this, up within it on both sides.
    Raises:
      ValueError: there is no such implementation, or the arrays do not fit together.
    """
    _check(x, experts, weights, gate, up, down)
    chosen = choose("moe", implementation)
    if chosen == XLA:
        return reference.routed_experts(x, experts, weights, gate, up, down, limit=limit)
    return _routed_experts(x, experts, weights, gate, up, down, limit, chosen)


def _check(x, experts, weights, gate, up, down) -> None:
    (tokens, d), (count, _, f) = x.shape, gate.shape
    wanted = (experts.shape, (tokens, *experts.shape[1:]), (count, d, f), (count, d, f),
              (count, f, d))  # fmt: skip
    found = weights.shape, experts.shape, gate.shape, up.shape, down.shape
    if wanted != found or min(x.size, experts.size, gate.size) == 0:
        raise ValueError(
            "moe: expected x [t, d], experts and weights [t, a], gate and up [e, d, f] and down "
            f"[e, f, d], none of them empty, got {x.shape}, {experts.shape}, {weights.shape}, "
            f"{gate.shape}, {up.shape} and {down.shape}"
        )
    if experts.size >= 2**24:
        raise ValueError(f"moe: expected fewer than 2^24 choices of experts, got {experts.size}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _routed_experts(x, experts, weights, gate, up, down, limit: float, platform: str):
    y, _ = _run(x, experts, weights, gate, up, down, limit, platform, keep=False)
    return y


def _run(x, experts, weights, gate, up, down, limit, platform, *, keep):
    kernels, d = KERNELS[platform], x.shape[1]
    plan = make_plan(experts, gate.shape[0], block_rows(experts.size, gate.shape[0]))
    padded, share = _pad(x, kernels), shares(weights, plan)
    matrices = [_pad(w.astype(x.dtype), kernels) for w in (gate, up, down)]
    hidden, *kept = kernels.hidden(padded, plan, share, *matrices[:2], limit=limit, keep=keep)
    rows = kernels.output(hidden, plan, matrices[2])
    return combine(rows, plan)[:, :d].astype(x.dtype), (plan, share, *kept)


def _pad(x: Array, kernels) -> Array:
    return pad_axes(x, {x.ndim - 1: kernels.UNIT, **({1: kernels.UNIT} if x.ndim == 3 else {})})


# Kept for the backward pass: the gate and up products of each row, in the dtype of x. With widths
# d and f that is 4 f bytes in bfloat16, written and read once. To compute them again would take
# 4 d f operations more, where forward and backward together take 18 d f: a fifth. Who has no room
# for them wraps the call in `jax.checkpoint`, as training wraps its layers.


def _forward(x, experts, weights, gate, up, down, limit, platform):
    y, kept = _run(x, experts, weights, gate, up, down, limit, platform, keep=True)
    return y, (x, weights, gate, up, down, kept)


def _backward(limit, platform, residuals, grad):
    x, weights, gate, up, down, (plan, share, *products) = residuals
    kernels, d, f = KERNELS[platform], *gate.shape[1:]
    matrices = [_pad(w.astype(x.dtype), kernels) for w in (gate, up, down)]
    padded, grad = _pad(x, kernels), _pad(grad.astype(x.dtype), kernels)
    hidden, grad_gate, grad_up, grad_share = kernels.hidden_gradients(
        grad, plan, share, *products, matrices[2], limit=limit
    )
    rows = kernels.row_gradients(grad_gate, grad_up, plan, *matrices[:2])
    grad_x = combine(rows, plan)[:, :d].astype(x.dtype)
    of_gate, of_up = kernels.weight_gradients(
        padded, (grad_gate, grad_up), plan, gathered="left", dtype=gate.dtype
    )
    (of_down,) = kernels.weight_gradients(
        hidden, (grad,), plan, gathered="right", dtype=down.dtype
    )
    grad_weights = jnp.take(grad_share, plan.place, mode="fill", fill_value=0)
    return (
        grad_x, None, grad_weights.astype(weights.dtype), of_gate[:, :d, :f],
        of_up[:, :d, :f].astype(up.dtype), of_down[:, :f, :d],
    )


_routed_experts.defvjp(_forward, _backward)
