"""Routed experts whose weights are FP4, for inference: kernels decode them as they read them."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.blocks import pad_axes
from pallas_kernels.codes import BYTES
from pallas_kernels.implementation import AUTO, XLA, choose
from pallas_kernels.moe import gpu, reference, tpu
from pallas_kernels.moe.formats import Fp4, decoded, halves, round_tokens
from pallas_kernels.moe.plan import block_rows, combine, make_plan, shares
from pallas_kernels.target import GPU


def routed_experts_fp4(
    x: Float[Array, "t d"], experts: Int[Array, "t a"], weights: Float[Array, "t a"],
    gate: Fp4, up: Fp4, down: Fp4, *, limit: float, rounded: bool, implementation: str = AUTO,
) -> Float[Array, "t d"]:
    """Compute `routed_experts` with stored weights: gate and up [e, f, d], down [e, d, f].

    Args:
      rounded: multiply tokens, and the hidden layer, rounded to FP8.
    Raises:
      ValueError: there is no such implementation, the arrays do not fit together, or there are more
        codes than a kernel can address.
    """
    chosen = choose("moe", implementation)
    _check(x, experts, weights, gate, up, down, chosen)
    if rounded:
        x = round_tokens(x)
    f, d = gate.codes.shape[1], x.shape[1]
    if chosen == XLA:
        matrices = (decoded(w).mT for w in (gate, up, down))
        return reference.routed_experts(
            x, experts, weights, *matrices, limit=limit, between=round_tokens if rounded else None
        ).astype(x.dtype)
    kernels = {"gpu": gpu, "tpu": tpu}[chosen]
    plan = make_plan(experts, gate.codes.shape[0], block_rows(experts.size, gate.codes.shape[0]))
    gate, up, down = (_pad(w, kernels.UNIT) for w in (gate, up, down))
    (hidden,) = kernels.hidden(
        halves(x, kernels.UNIT), plan, shares(weights, plan), gate, up, limit=limit, keep=False
    )
    hidden = hidden[:, :f]
    if rounded:
        hidden = round_tokens(hidden)
    rows = kernels.output(halves(hidden, kernels.UNIT), plan, down)
    return combine(rows, plan)[:, :d].astype(x.dtype)


def _pad(matrices: Fp4, unit: int) -> Fp4:
    codes = pad_axes(matrices.codes, {1: unit, 2: unit})
    return Fp4(codes, pad_axes(matrices.scales, {1: unit, 2: unit // BYTES}))


def _check(x, experts, weights, gate: Fp4, up: Fp4, down: Fp4, chosen: str) -> None:
    (tokens, d), (count, f, _) = x.shape, gate.codes.shape
    inner, outer = Fp4((count, f, d // 2), (count, f, d // 32)), (count, d, f // 2)
    wanted = inner, inner, Fp4(outer, (count, d, f // 32)), (tokens, *experts.shape[1:])
    found = *(Fp4(w.codes.shape, w.scales.shape) for w in (gate, up, down)), experts.shape
    if wanted != found or weights.shape != experts.shape or d % 32 or f % 32:
        raise ValueError(
            "moe: expected x [t, d], experts and weights [t, a], codes of gate and up [e, f, d/2] "
            "and of down [e, d, f/2], a scale for 32 columns, d and f multiples of 32, got "
            f"{x.shape}, {experts.shape}, {weights.shape}, {', '.join(map(str, found[:3]))}"
        )
    # Pallas addresses arrays of up to 2^32 bytes by signed 32-bit offsets.
    if chosen == GPU and gate.codes.size >= 2**31:
        raise ValueError(
            f"moe: expected fewer than 2^31 bytes of codes on a GPU, got {gate.codes.size}"
        )
