"""Compute routed experts without dropping tokens: gather rows by expert, multiply, add back."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from dsv4_jax.errors import InputError
from dsv4_jax.layers import clamped_swiglu
from dsv4_jax.rounding import TOKEN_BLOCK, round_tokens
from dsv4_jax.router import Routing
from dsv4_jax.shapes import Array, Float, Hidden, Int
from dsv4_jax.sharding import BATCH_AXES
from pallas_kernels import moe
from pallas_kernels.implementation import XLA


class ExpertWeights(NamedTuple):
    """The SwiGLU weights of all experts held here."""

    gate: Float[Array, "e d f"]
    up: Float[Array, "e d f"]
    down: Float[Array, "e f d"]


class Plan(NamedTuple):
    """Where each token slot stands among rows grouped by expert.

    `source` and `place` are inverse to each other; an index past the end means "nothing".
    """

    source: Int[Array, " rows"]  # token slot (token * a + choice) of each row
    place: Int[Array, "t a"]  # row of each token slot


def routed_experts(
    x: Hidden, routing: Routing, weights: ExpertWeights, *, limit: float, implementation: str,
    mesh: Mesh | None, invariant: bool = False, rounded: bool = False, kernel: str = XLA,
) -> Hidden:
    """Return the weighted sum of each token's experts.

    Args:
      routing: experts from 0 on; an id past the last expert stands for none.
      implementation: "blocks" gathers rows into blocks of one expert each and multiplies the
        blocks as a batch; "ragged" leaves the grouping to `lax.ragged_dot`; "auto" takes blocks
        on CPU, where ragged_dot computes every expert for every row.
      mesh: devices that share the experts ("expert"), their width ("tensor") and the tokens.
      invariant: for inference: give a token the same bits whatever the number beside it.
      rounded: multiply tokens rounded to FP8.
      kernel: what `moe.routed_experts` calls implementation; where it means "xla",
        `implementation` decides.
    Raises:
      InputError: channels that FP8 scales together would be on several devices.
    """
    if rounded and mesh is not None:
        _check_groups(weights.down.shape[1], mesh.shape["tensor"])
    if implementation == "auto":
        implementation = "blocks" if jax.default_backend() == "cpu" else "ragged"
    compute = partial(
        _compute_experts, limit=limit, implementation=implementation, invariant=invariant,
        rounded=rounded, kernel=kernel,
    )
    if mesh is None:
        return compute(x, *routing, weights).astype(x.dtype)
    rows, experts = PartitionSpec(BATCH_AXES), PartitionSpec("expert", None, "tensor")
    specs = (rows, rows, rows, ExpertWeights(experts, experts, PartitionSpec("expert", "tensor")))
    sharded = jax.shard_map(
        partial(_exchange, compute), mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False
    )
    return sharded(x, *routing, weights)


def _check_groups(width: int, devices: int) -> None:
    group = TOKEN_BLOCK[1]
    if devices > 1 and width // devices % group:
        raise InputError(
            f"mesh.tensor: expected parts of moe_intermediate_size in multiples of {group}, which "
            f"FP8 scales together, got {width} / {devices} = {width // devices}; use fewer devices "
            "there, or runtime.linears=plain"
        )


def _exchange(compute, x, experts, gates, weights: ExpertWeights):
    """Bring the tokens of an expert group together, compute the experts held here, add up."""
    gather = partial(jax.lax.all_gather, axis_name="expert", axis=0, tiled=True)
    held = weights.gate.shape[0]
    local = gather(experts) - jax.lax.axis_index("expert") * held
    # Ids of experts held elsewhere, on either side, become the one id past the end.
    local = jnp.where((local >= 0) & (local < held), local, held)
    y = compute(gather(x), local, gather(gates), weights)
    y = jax.lax.psum(y, "tensor")
    return jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True).astype(x.dtype)


def _compute_experts(
    x: Hidden, experts: Int[Array, "b t a"], gates: Float[Array, "b t a"],
    weights: ExpertWeights, *, limit: float, implementation: str, invariant: bool, rounded: bool,
    kernel: str,
) -> Hidden:
    """Sum the experts held here; ids past the last of them contribute nothing. float32."""
    b, t, d = x.shape
    count, chosen = weights.gate.shape[0], experts.reshape(b * t, -1)
    kernel = moe.choose_for(x, chosen, weights.gate, kernel)
    if kernel != XLA:
        y = moe.routed_experts(
            x.reshape(b * t, d), chosen, gates.reshape(b * t, -1), *weights, limit=limit,
            rounded=rounded, invariant=invariant, implementation=kernel,
        )
        return y.reshape(b, t, d)
    weights = jax.tree.map(lambda w: w.astype(x.dtype), weights)
    if implementation == "blocks":
        size = _fixed_block_rows(b * t) if invariant else _block_rows(chosen.size, count)
        plan, block_expert = _plan_blocks(chosen, count, size)
        product = partial(_by_block, block_expert=block_expert, skip_empty=invariant)
    else:
        plan, sizes = _plan_groups(chosen, count)
        product = partial(_by_group, sizes=sizes)
    x = x.reshape(b * t, d)
    rows = _dispatch(round_tokens(x) if rounded else x, plan)
    row_gates = jnp.take(gates.reshape(-1), plan.source, mode="fill", fill_value=0)
    expert = partial(_expert, limit=limit, rounded=rounded)
    out = product(expert, rows, row_gates, weights)
    return _combine(out, plan).reshape(b, t, d)


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


def _plan_groups(experts: Int[Array, "t a"], count: int) -> tuple[Plan, Int[Array, " e"]]:
    """Sort token slots by expert; return the plan and the rows of each expert."""
    flat = experts.reshape(-1)
    source = jnp.argsort(flat, stable=True)
    place = jnp.zeros_like(source).at[source].set(jnp.arange(flat.size))
    here = flat < count
    sizes = jnp.zeros(count, jnp.int32).at[flat].add(1, mode="drop")
    place = jnp.where(here, place, flat.size)
    return Plan(jnp.where(here[source], source, flat.size), place.reshape(experts.shape)), sizes


def _plan_blocks(
    experts: Int[Array, "t a"], count: int, size: int
) -> tuple[Plan, Int[Array, " blocks"]]:
    """Give every expert whole blocks of `size` rows; return the plan and each block's expert.

    A block of nobody has the id past the last expert.
    """
    plan, sizes = _plan_groups(experts, count)
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


# Moving token rows to expert rows and adding expert rows into token rows are each other's
# transposes; both are gathers, because a plan holds the indices of both directions.


@jax.custom_vjp
def _dispatch(x: Float[Array, "t d"], plan: Plan) -> Float[Array, "rows d"]:
    """Copy each token's row to the rows of its experts; rows of nobody are 0."""
    return jnp.take(x, plan.source // plan.place.shape[1], axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def _combine(rows: Float[Array, "rows d"], plan: Plan) -> Float[Array, "t d"]:
    """Add up the rows of each token's experts; places past the end add nothing."""
    return jnp.sum(jnp.take(rows, plan.place, axis=0, mode="fill", fill_value=0), axis=1)


_dispatch.defvjp(
    lambda x, plan: (_dispatch(x, plan), plan), lambda plan, grad: (_combine(grad, plan), None)
)
_combine.defvjp(
    lambda rows, plan: (_combine(rows, plan), plan),
    lambda plan, grad: (_dispatch(grad, plan), None),
)
