"""What a training step changes, and how it lies on a mesh."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import NamedSharding, SingleDeviceSharding

from dsv4_jax.model import init_params, param_shapes
from dsv4_jax.optimizer import LEARNERS, Placed, make_optimizer
from dsv4_jax.params import Weight, kinds_of, moment_split, shardings_of, split_trainable
from dsv4_jax.run_config import RunConfig
from dsv4_jax.shapes import Array
from dsv4_jax.sharding import AnyMesh, replicated, spec_of
from pallas_kernels.implementation import implementation_of


class Skips(NamedTuple):
    """Batches that moved nothing, because their loss or gradient was not finite."""

    total: Array  # since the run began
    in_row: Array  # up to the last batch


class TrainState(NamedTuple):
    """All that a run continues from, beside its place in the data."""

    step: Array  # batches seen; optimizer steps taken are these less the skipped
    skips: Skips
    params: dict
    opt_state: optax.OptState


def init_state(
    config: RunConfig, mesh: AnyMesh | None = None, params: dict | None = None
) -> TrainState:
    """Make the state that a run starts from; on a mesh it is born sharded, never whole.

    Args:
      params: to start from, on the mesh; None: they are drawn.
    """
    if params is None:
        key = jax.random.key(config.train.seed)
        params = init_params(config.model, key, mesh, config.mesh.layout)
    placed = state_shardings(config, mesh)
    opt_placed, counter = (None, None) if mesh is None else (placed.opt_state, placed.step)
    init = jax.jit(optimizer_of(config).init, out_shardings=opt_placed)
    step, total, in_row = (jax.device_put(jnp.int32(0), counter) for _ in range(3))
    return TrainState(step, Skips(total, in_row), params, init(split_trainable(params)[0]))


def abstract_state(config: RunConfig, mesh: AnyMesh | None = None) -> TrainState:
    """Return the shapes, dtypes and placement of a run's state; nothing is computed."""
    shapes = state_shapes(config)
    if mesh is None:
        placed = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), shapes)
    else:
        placed = state_shardings(config, mesh)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes, placed,
    )


def state_shardings(config: RunConfig, mesh: AnyMesh | None) -> TrainState | None:
    """Return the placement of a state: the optimizer's moments are split further than parameters.

    Source: report 3 (ZeRO); fact sheet 7.
    """
    if mesh is None:
        return None
    shapes = state_shapes(config)
    params = shardings_of(param_shapes(config.model), mesh, config.mesh.layout)
    moments = jax.tree.map(
        lambda split: NamedSharding(mesh, spec_of(split)), moment_splits(config, mesh),
        is_leaf=is_split,
    )
    opt_state = optax.tree_map_params(
        optimizer_of(config),
        lambda moment, sharding: moment if _is_masked(moment) else sharding,
        shapes.opt_state, moments,
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=_is_masked,  # the place of a parameter that another optimizer updates
    )
    counter = replicated(mesh)
    return TrainState(counter, Skips(counter, counter), params, opt_state)


def param_specs(config: RunConfig, mesh: AnyMesh) -> dict:
    """Return the partitions of the parameters."""
    placed = shardings_of(param_shapes(config.model), mesh, config.mesh.layout)
    return jax.tree.map(lambda sharding: sharding.spec, placed)


def moment_splits(config: RunConfig, mesh: AnyMesh) -> dict:
    """Return how the moments of all leaves that can learn are split, and their gradients with them.
    """
    trainable = split_trainable(param_shapes(config.model))[0]
    return jax.tree.map(
        lambda weight: moment_split(weight, mesh, config.mesh.layout), trainable,
        is_leaf=lambda leaf: isinstance(leaf, Weight),
    )


def is_split(leaf) -> bool:
    """Say whether this is a leaf of `moment_splits`."""
    return isinstance(leaf, tuple)


def _is_masked(leaf) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def state_shapes(config: RunConfig) -> TrainState:
    """Return the shapes and dtypes of a run's state."""
    params = nn.meta.unbox(param_shapes(config.model))
    opt_state = jax.eval_shape(optimizer_of(config).init, split_trainable(params)[0])
    counter = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(counter, Skips(counter, counter), params, opt_state)


def optimizer_of(
    config: RunConfig, learners: Collection[str] = LEARNERS, mesh: AnyMesh | None = None
) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer of a run, in which these learn."""
    kinds = split_trainable(kinds_of(param_shapes(config.model)))[0]
    placed = None if mesh is None else Placed(mesh, moment_splits(config, mesh))
    implementation = implementation_of("newton_schulz", config.runtime.kernels)
    return make_optimizer(config.optimizer, kinds, learners, implementation, placed)
