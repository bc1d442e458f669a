"""Other implementations of the operations that `kernels.py` times, where they are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case
from pallas_kernels.moe.cases import GRADIENT, LIMIT, gradient_of
from pallas_kernels.moe.swiglu import clamped_swiglu


def peers(case: Case) -> dict[str, Callable]:
    """Return functions of a case's arguments by their names.

    Nobody offers V4's attention in JAX: 512 channels, a sink and entries that a query chooses.
    """
    if case.operation != "moe" or "FP4" in case.name:
        return {}
    products = {"lax.ragged_dot": jax.lax.ragged_dot}
    if importlib.util.find_spec("tokamax"):
        import tokamax

        products["tokamax"] = tokamax.ragged_dot
    form = gradient_of if GRADIENT in case.name else lambda forward: forward
    return {name: form(partial(routed_experts, product)) for name, product in products.items()}


def routed_experts(ragged_dot: Callable, x, experts, weights, gate, up, down):
    """Compute `pallas_kernels.moe.routed_experts` by grouped products of rows that are sorted."""
    chosen, choices = experts.reshape(-1), experts.shape[1]
    order = jnp.argsort(chosen)
    product = partial(
        ragged_dot, group_sizes=jnp.bincount(chosen, length=gate.shape[0]),
        preferred_element_type=jnp.float32,
    )
    rows, share = x[order // choices], weights.reshape(-1)[order, None]
    hidden = clamped_swiglu(product(rows, gate), product(rows, up), LIMIT) * share
    out = product(hidden.astype(x.dtype), down)
    return jnp.zeros(x.shape, jnp.float32).at[order // choices].add(out)
