"""Compute routed experts without dropping tokens: gather rows by expert, multiply, add back.

XLA's products are "blocks", rows gathered into blocks of one expert each that are multiplied as a
batch, or "ragged", the grouping left to `lax.ragged_dot`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.collectives import sum_over
from dsv4_jax.config import PLAIN, Runtime
from dsv4_jax.errors import InputError
from dsv4_jax.expert_plan import Plan, combine, dispatch, plan_groups
from dsv4_jax.expert_waves import AXIS, in_waves
from dsv4_jax.layers import clamped_swiglu
from dsv4_jax.rounding import TOKEN_BLOCK, round_tokens
from dsv4_jax.router import Routing
from dsv4_jax.shapes import Array, Float, Hidden, Int
from pallas_kernels import moe
from pallas_kernels.implementation import XLA
from pallas_kernels.target import CPU, target_platform


class ExpertWeights(NamedTuple):
    """The SwiGLU weights of all experts held here."""

    gate: Float[Array, "e d f"]
    up: Float[Array, "e d f"]
    down: Float[Array, "e f d"]


def routed_experts(
    x: Hidden, routing: Routing, weights: ExpertWeights, *, limit: float, runtime: Runtime
) -> Hidden:
    """Return the weighted sum of each token's experts.

    On a mesh this runs on every device, for its tokens and with the experts that it holds.

    Args:
      routing: experts from 0 on; an id past the last expert stands for none.
    Raises:
      InputError: channels that FP8 scales together would be on several devices.
    """
    mesh, rounded = runtime.mesh, runtime.linears != PLAIN
    if rounded and mesh is not None:
        _check_groups(weights.down.shape[1], mesh.shape["tensor"])
    compute = partial(_compute_experts, weights=weights, limit=limit, runtime=runtime)
    tokens, experts, gates = (leaf.reshape(-1, leaf.shape[-1]) for leaf in (x, *routing))
    if mesh is None or mesh.shape[AXIS] == 1:
        y = compute(tokens, experts, gates)
    else:
        # With an even load; a device has room for more.
        expected = -(-len(tokens) // runtime.expert_waves) * experts.shape[1]
        y = in_waves(
            partial(compute, expected=expected),
            tokens, experts, gates, weights.gate.shape[0], mesh,
            waves=runtime.expert_waves, slack=runtime.expert_slack,
        )
    return sum_over(y, ("tensor",), mesh).astype(x.dtype).reshape(x.shape)


def _check_groups(width: int, devices: int) -> None:
    group = TOKEN_BLOCK[1]
    if devices > 1 and width % group:
        raise InputError(
            f"mesh.tensor: expected parts of moe_intermediate_size in multiples of {group}, which "
            f"FP8 scales together, got {width * devices} / {devices} = {width}; use fewer devices "
            "there, or runtime.linears=plain"
        )


def _compute_experts(
    x: Float[Array, "t d"], experts: Int[Array, "t a"], gates: Float[Array, "t a"], *,
    weights: ExpertWeights, limit: float, runtime: Runtime, expected: int | None = None,
) -> Float[Array, "t d"]:
    """Sum the experts held here; ids past the last of them contribute nothing. float32.

    Args:
      expected: ids that are probably of experts held here; None: all.
    """
    rounded, invariant = runtime.linears != PLAIN, runtime.batch_invariant
    count = weights.gate.shape[0]
    kernel = moe.choose_for(x, experts, weights.gate, runtime.implementation("moe"))
    if kernel != XLA:
        return moe.routed_experts(
            x, experts, gates, *weights, limit=limit, rounded=rounded, invariant=invariant,
            expected=expected, implementation=kernel,
        )
    weights = jax.tree.map(lambda w: w.astype(x.dtype), weights)
    if _form(runtime) == "blocks":
        size = _fixed_block_rows(len(x)) if invariant else _block_rows(experts.size, count)
        plan, block_expert = _plan_blocks(experts, count, size)
        product = partial(_by_block, block_expert=block_expert, skip_empty=invariant)
    else:
        plan, sizes = plan_groups(experts, count)
        product = partial(_by_group, sizes=sizes)
    rows = dispatch(round_tokens(x) if rounded else x, plan)
    row_gates = jnp.take(gates.reshape(-1), plan.source, mode="fill", fill_value=0)
    expert = partial(_expert, limit=limit, rounded=rounded)
    return combine(product(expert, rows, row_gates, weights), plan)


def _form(runtime: Runtime) -> str:
    """Return how XLA multiplies: on CPU ragged_dot would compute every expert for every row."""
    if runtime.moe != "auto":
        return runtime.moe
    return "blocks" if target_platform() == CPU else "ragged"


def _expert(product, rows, row_gates, weights: ExpertWeights, *, limit: float, rounded: bool):
    """Run a SwiGLU expert; the expert's weight scales its hidden layer, as in the reference."""
    gate, up = product(rows, weights.gate), product(rows, weights.up)
    hidden = clamped_swiglu(gate, up, limit) * row_gates[:, None]
    hidden = hidden.astype(rows.dtype)
    return product(round_tokens(hidden) if rounded else hidden, weights.down)


def _by_group(expert, rows, row_gates, weights: ExpertWeights, *, sizes: Int[Array, " e"]):
    """Run all experts at once, on rows sorted by expert."""
    product = partial(jax.lax.ragged_dot, group_sizes=sizes, preferred_element_type=jnp.float32)
    return expert(product, rows, row_gates, weights)


def _by_block(
    expert, rows, row_gates, weights: ExpertWeights, *, block_expert: Array, skip_empty: bool
):
    """Run block after block, each with the weights of its one expert; blocks of nobody are 0.

    Nothing between the products outlives its block, which stays in cache, forward and backward.
    Few tokens leave most blocks empty, and skipping these saves reading weights. The gradient of
    a skip would be an array of all weights for every block.
    """
    product = partial(jnp.matmul, preferred_element_type=jnp.float32)

    def run(rows, row_gates, index):
        return expert(product, rows, row_gates, jax.tree.map(lambda w: w[index], weights))

    def run_or_skip(rows, row_gates, index):
        empty = jnp.zeros(rows.shape, jnp.float32)
        return jax.lax.cond(
            index < weights.gate.shape[0], run, lambda *_: empty, rows, row_gates, index
        )

    run_block = jax.checkpoint(run_or_skip if skip_empty else run)
    count = block_expert.size
    blocks = (rows.reshape(count, -1, rows.shape[-1]), row_gates.reshape(count, -1), block_expert)
    return jax.lax.map(lambda block: run_block(*block), blocks).reshape(rows.shape[0], -1)


def _plan_blocks(
    experts: Int[Array, "t a"], count: int, size: int
) -> tuple[Plan, Int[Array, " blocks"]]:
    """Give every expert whole blocks of `size` rows; return the plan and each block's expert.

    A block of nobody has the id past the last expert.
    """
    plan, sizes = plan_groups(experts, count)
    slots = experts.size
    rows = min(slots // size + count, slots) * size  # the most that any choice of experts needs
    blocks = -(-sizes // size)
    last_block = jnp.cumsum(blocks)
    shift = (last_block - blocks) * size - (jnp.cumsum(sizes) - sizes)
    place = plan.place + shift[jnp.minimum(experts, count - 1)]
    place = jnp.where(plan.place == slots, rows, place)
    source = jnp.full(rows, slots).at[place.reshape(-1)].set(jnp.arange(slots), mode="drop")
    block_expert = jnp.searchsorted(last_block, jnp.arange(rows // size), side="right")
    return Plan(source, place), block_expert


def _block_rows(slots: int, experts: int) -> int:
    """Choose the rows of a block: at most 128, a matrix product that fits a CPU's cache; fewer
    where experts have few rows, as the last block of each is on average half empty."""
    return max(8, min(128, 2 ** (slots // experts).bit_length() // 2))


def _fixed_block_rows(tokens: int) -> int:
    """Choose them from two sizes alone, for few tokens and for many.

    XLA on CPU has a kernel for products of 2 to about 32 rows and another for more; within each a
    row's bits do not depend on how many there are.
    """
    return 8 if tokens <= 32 else 64
