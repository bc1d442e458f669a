"""Bring rows of one expert together and back to their tokens."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.shapes import Array, Float, Int
from pallas_kernels.moe.plan import ranks
from pallas_kernels.target import TPU, target_platform


class Plan(NamedTuple):
    """Where each token slot stands among rows grouped by expert.

    `source` and `place` are inverse to each other; an index past the end means "nothing".
    """

    source: Int[Array, " rows"]  # token slot (token * a + choice) of each row
    place: Int[Array, "t a"]  # row of each token slot


def plan_groups(experts: Int[Array, "t a"], count: int) -> tuple[Plan, Int[Array, " e"]]:
    """Order token slots by expert; return the plan and the rows of each expert.

    An id of `count` stands for none.
    """
    flat, slots = experts.reshape(-1), experts.size
    here, number = flat < count, jnp.arange(slots)
    if target_platform() == TPU:  # whose compiler takes 5 s for a sort
        rank, sizes = ranks(flat, count)
        first = jnp.cumsum(sizes) - sizes
        place = jnp.where(here, first[jnp.minimum(flat, count - 1)] + rank, slots)
        source = jnp.full(slots, slots).at[place].set(number, mode="drop")
    else:
        source = jnp.argsort(flat, stable=True)
        sizes = jnp.zeros(count, jnp.int32).at[flat].add(1, mode="drop")
        place = jnp.where(here, jnp.zeros_like(source).at[source].set(number), slots)
        source = jnp.where(here[source], source, slots)
    return Plan(source, place.reshape(experts.shape)), sizes


# Moving token rows to expert rows and adding expert rows into token rows are each other's
# transposes; both are gathers, because a plan holds the indices of both directions.


@jax.custom_vjp
def dispatch(x: Float[Array, "t d"], plan: Plan) -> Float[Array, "rows d"]:
    """Copy each token's row to the rows of its experts; rows of nobody are 0."""
    return jnp.take(x, plan.source // plan.place.shape[1], axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def combine(rows: Float[Array, "rows d"], plan: Plan) -> Float[Array, "t d"]:
    """Add up the rows of each token's experts; places past the end add nothing."""
    return jnp.sum(jnp.take(rows, plan.place, axis=0, mode="fill", fill_value=0), axis=1)


dispatch.defvjp(
    lambda x, plan: (dispatch(x, plan), plan), lambda plan, grad: (combine(grad, plan), None)
)
combine.defvjp(
    lambda rows, plan: (combine(rows, plan), plan),
    lambda plan, grad: (dispatch(grad, plan), None),
)
