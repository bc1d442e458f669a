"""Meshes of the simulated devices, and the experts of a model run on one, as the model does."""

from __future__ import annotations

import dataclasses

import jax

from dsv4_jax.config import Runtime
from dsv4_jax.experts import ExpertWeights, routed_experts
from dsv4_jax.router import Routing
from dsv4_jax.sharding import BATCH_AXES, make_mesh

P = jax.sharding.PartitionSpec


def mesh_of(data: int = 1, fsdp: int = 1, expert: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    """Return a mesh of the first simulated devices."""
    return make_mesh({"data": data, "fsdp": fsdp, "expert": expert, "tensor": tensor})


def experts_on(mesh, x, routing: Routing, weights: ExpertWeights, *, limit: float, **runtime):
    """Return `routed_experts` of whole arrays; None is one device."""
    runtime = dataclasses.replace(Runtime(**runtime), mesh=mesh)

    def compute(x, routing, weights):
        return routed_experts(x, routing, weights, limit=limit, runtime=runtime)

    if mesh is not None:
        rows, experts = P(BATCH_AXES), P("expert", None, "tensor")
        compute = jax.shard_map(
            compute, mesh=mesh, out_specs=rows, check_vma=False,
            in_specs=(rows, rows, ExpertWeights(experts, experts, P("expert", "tensor"))),
        )
    return compute(x, routing, weights)
