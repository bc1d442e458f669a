"""The routed experts of a mixture: each token's few of many SwiGLU layers, without dropping any.

Rows are sorted by expert and fill whole blocks of one expert each, which kernels multiply with that
expert's weights.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.blocks import pad_axes
from pallas_kernels.implementation import AUTO, XLA, choose
from pallas_kernels.moe import gpu, reference, tpu
from pallas_kernels.moe.formats import Fp4, round_tokens
from pallas_kernels.moe.fp4 import routed_experts_fp4
from pallas_kernels.moe.plan import INVARIANT, block_rows, combine, make_plan, shares

__all__ = ["Fp4", "routed_experts", "routed_experts_fp4"]

KERNELS = {"gpu": gpu, "tpu": tpu}
WORTHWHILE = 64  # channels: fewer leave most of a kernel's tiles empty
MOST_CHOICES = 2**24  # are counted exactly in float32


class _How(NamedTuple):
    """How kernels compute."""

    platform: str
    limit: float
    rounded: bool
    rows: int  # of a block
    expected: int | None  # choices that are probably experts

    @property
    def kernels(self):
        return KERNELS[self.platform]

    def before_product(self, x: Array) -> Array:
        return round_tokens(x) if self.rounded else x


def routed_experts(
    x: Float[Array, "t d"], experts: Int[Array, "t a"], weights: Float[Array, "t a"],
    gate: Float[Array, "e d f"], up: Float[Array, "e d f"], down: Float[Array, "e f d"], *,
    limit: float, rounded: bool = False, invariant: bool = False, expected: int | None = None,
    implementation: str = AUTO,
) -> Float[Array, "t d"]:
    """Return the weighted sum of each token's experts, float32.

    Products are of x's dtype, summed in float32; the hidden layer, which a choice's weight
    multiplies, and the output of each choice are rounded to it once.

    Args:
      experts: ids from 0 on; one outside of 0...e-1 stands for none.
      limit: of the SwiGLU: gate is at most this, up within it on both sides.
      rounded: multiply tokens, and the hidden layer, rounded to FP8; gradients pass straight
        through.
      invariant: cut the work up alike whatever the number of tokens.
      expected: choices that are probably experts; None: all. The compiler is told that these take
        time, whatever is chosen.
    Raises:
      ValueError: there is no such implementation, or the arrays do not fit together.
    """
    _check(x, experts, weights, gate, up, down)
    chosen = choose_for(x, experts, gate, implementation)
    if chosen == XLA:
        return reference.routed_experts(
            round_tokens(x) if rounded else x, experts, weights, gate, up, down, limit=limit,
            between=round_tokens if rounded else None,
        )
    rows = INVARIANT if invariant else block_rows(experts.size, gate.shape[0])
    return _routed_experts(
        x, experts, weights, gate, up, down, _How(chosen, limit, rounded, rows, expected)
    )


def choose_for(
    x: Float[Array, "*t d"], experts: Int[Array, "t a"], gate: Float[Array, "e d f"],
    implementation: str,
) -> str:
    """Return "xla", "gpu" or "tpu" for such arguments of `routed_experts`.

    Raises:
      ValueError: there is no such implementation, or its kernels do not take so many choices.
    """
    fits = 0 < experts.size < MOST_CHOICES
    wide = x.dtype == jnp.bfloat16 and min(gate.shape[1:]) >= WORTHWHILE
    chosen = choose("moe", implementation, worthwhile=fits and wide)
    if chosen != XLA and not fits:
        raise ValueError(
            f"moe: expected from 1 to {MOST_CHOICES - 1} choices of experts for a kernel, got "
            f"{experts.size}"
        )
    return chosen


def _check(x, experts, weights, gate, up, down) -> None:
    (tokens, d), (count, _, f) = x.shape, gate.shape
    wanted = (experts.shape, (tokens, *experts.shape[1:]), (count, d, f), (count, d, f),
              (count, f, d))  # fmt: skip
    found = weights.shape, experts.shape, gate.shape, up.shape, down.shape
    if wanted != found:
        raise ValueError(
            "moe: expected x [t, d], experts and weights [t, a], gate and up [e, d, f] and down "
            f"[e, f, d], got {x.shape}, {experts.shape}, {weights.shape}, "
            f"{gate.shape}, {up.shape} and {down.shape}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _routed_experts(x, experts, weights, gate, up, down, how: _How):
    return _run(x, experts, weights, gate, up, down, how, keep=False)[0]


def _run(x, experts, weights, gate, up, down, how: _How, *, keep):
    kernels, d = how.kernels, x.shape[1]
    plan = make_plan(experts, gate.shape[0], how.rows, how.expected)
    padded, share = _pad(how.before_product(x), kernels), shares(weights, plan)
    matrices = [_pad(w.astype(x.dtype), kernels) for w in (gate, up, down)]
    hidden, *kept = kernels.hidden(padded, plan, share, *matrices[:2], limit=how.limit, keep=keep)
    rows = kernels.output(how.before_product(hidden), plan, matrices[2])
    return combine(rows, plan)[:, :d], (plan, share, *kept)


def _pad(x: Array, kernels) -> Array:
    return pad_axes(x, {x.ndim - 1: kernels.UNIT, **({1: kernels.UNIT} if x.ndim == 3 else {})})


# Kept for the backward pass: the gate and up products of each row, in the dtype of x. With widths
# d and f that is 4 f bytes in bfloat16, written and read once. To compute them again would take
# 4 d f operations more, where forward and backward together take 18 d f: a fifth. Who has no room
# for them wraps the call in `jax.checkpoint`, as training wraps its layers.


def _forward(x, experts, weights, gate, up, down, how):
    y, kept = _run(x, experts, weights, gate, up, down, how, keep=True)
    return y, (x, weights, gate, up, down, kept)


def _backward(how, residuals, grad):
    x, weights, gate, up, down, (plan, share, *products) = residuals
    kernels, d, f = how.kernels, *gate.shape[1:]
    matrices = [_pad(w.astype(x.dtype), kernels) for w in (gate, up, down)]
    padded, grad = _pad(how.before_product(x), kernels), _pad(grad.astype(x.dtype), kernels)
    hidden, grad_gate, grad_up, grad_share = kernels.hidden_gradients(
        grad, plan, share, *products, matrices[2], limit=how.limit
    )
    rows = kernels.row_gradients(grad_gate, grad_up, plan, *matrices[:2])
    grad_x = combine(rows, plan)[:, :d].astype(x.dtype)
    of_gate, of_up = kernels.weight_gradients(
        padded, (grad_gate, grad_up), plan, gathered="left", dtype=gate.dtype
    )
    (of_down,) = kernels.weight_gradients(
        how.before_product(hidden), (grad,), plan, gathered="right", dtype=down.dtype
    )
    grad_weights = jnp.take(grad_share, plan.place, mode="fill", fill_value=0)
    return (
        grad_x, None, grad_weights.astype(weights.dtype), of_gate[:, :d, :f],
        of_up[:, :d, :f].astype(up.dtype), of_down[:, :f, :d],
    )


_routed_experts.defvjp(_forward, _backward)
