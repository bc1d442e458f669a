"""The gradient of a batch's losses, over micro-batches and over the devices of a mesh."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, PartitionSpec

from dsv4_jax.attention.lesson import Lesson
from dsv4_jax.collectives import max_over, sum_gradient, sum_over
from dsv4_jax.model import Transformer
from dsv4_jax.optimizer import INDEXERS, MODEL, learner_of
from dsv4_jax.params import merge, split_trainable
from dsv4_jax.run_config import RunConfig, StageConfig
from dsv4_jax.shapes import Array, Float
from dsv4_jax.sharding import BATCH_AXES, parts_of, spec_of
from dsv4_jax.stage_model import (
    Batch,
    learners_of,
    model_inputs,
    nats,
    rows_first,
    targets,
    transformer_of,
)
from dsv4_jax.train_state import is_split, moment_splits, param_specs


class Sums(NamedTuple):
    """What micro-batches add up to."""

    next_token: Float[Array, ""]  # nats
    mtp: Float[Array, ""]  # nats
    balance: Float[Array, ""]  # over layers, weighted by the micro-batch's share of the rows
    divergence: Float[Array, ""]  # of indexers from attention, over queries and layers, nats
    recall: Float[Array, ""]  # of the attention, by the choices of indexers, over the same
    choices: Float[Array, ""]  # how many these are
    load: dict[str, Array]  # token slots of each expert, by the path of the layer's block
    sinkhorn_error: Float[Array, ""]  # of all layers the largest, and so of micro-batches


def make_gradient(
    config: RunConfig, stage: StageConfig, mesh: Mesh | None
) -> Callable[[dict, dict, Batch, Array], tuple[dict, Sums]]:
    """Return the function to the gradient of a batch's objective and the sums that make it up.

    Of the leaves that learn, of all others, a batch, and the weights of the first `Sums`, as many
    as there are losses. On a mesh every device runs the model on its rows; a gradient is then added
    up over the devices that hold the same part of the leaf.
    """
    learners = learners_of(stage)
    model = transformer_of(config, stage, mesh, index_learns=INDEXERS in learners)
    share = 1 / stage.accumulation
    if mesh is not None:
        share /= parts_of(BATCH_AXES, mesh)

    def objective(learning: dict, others: dict, rows: Batch, weights: Array):
        sums = _forward(model, merge(learning, others), rows, share, mtp=MODEL in learners)
        return total(weights, sums), sums

    def gradient(learning: dict, others: dict, batch: Batch, weights: Array):
        def of_rows(learning, rows):
            return jax.grad(objective, has_aux=True)(learning, others, rows, weights)

        return _accumulate(of_rows, learning, batch, stage.accumulation)

    if mesh is None:
        return gradient
    trainable, fixed = split_trainable(param_specs(config, mesh))
    learning, resting = split_learning(trainable, learners)
    splits = split_learning(moment_splits(config, mesh), learners)[0]

    def on_device(parts: dict, others: dict, batch: Batch, weights: Array):
        # Devices along "tensor" work on the same rows: their objectives add up to one.
        gradients, sums = gradient(parts, others, batch, weights / mesh.shape["tensor"])
        gradients = jax.tree.map(partial(sum_gradient, mesh=mesh), gradients, learning, splits)
        return gradients, _sum_up(sums, mesh)

    rows, summed = PartitionSpec(BATCH_AXES), jax.tree.map(spec_of, splits, is_leaf=is_split)
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(learning, merge(resting, fixed), rows, PartitionSpec()),
        out_specs=(summed, PartitionSpec()), check_vma=False,
    )


def total(weights: Float[Array, " losses"], sums: Sums) -> Float[Array, ""]:
    """Return the objective that these sums make up."""
    return jnp.dot(weights, jnp.stack(sums[: len(weights)]))


def split_learning(trainable: dict, learners: Collection[str]) -> tuple[dict, dict]:
    """Split a tree like the trainable parameters into the leaves that learn and the rest."""
    flat = flatten_dict(trainable)
    learning = {path: leaf for path, leaf in flat.items() if learner_of(path) in learners}
    resting = {path: leaf for path, leaf in flat.items() if path not in learning}
    return unflatten_dict(learning), unflatten_dict(resting)


def _sum_up(sums: Sums, mesh: Mesh | None) -> Sums:
    """Add up what devices have found in their rows."""
    error = max_over(sums.sinkhorn_error, BATCH_AXES, mesh)
    return sum_over(sums, BATCH_AXES, mesh)._replace(sinkhorn_error=error)


def _forward(model: Transformer, params: dict, batch: Batch, share: float, mtp: bool) -> Sums:
    """Run the model on a micro-batch, which is this share of the batch."""
    chosen = {
        path: rows_first(experts).astype(jnp.int32)
        for path, experts in batch.get("experts", {}).items()
    }
    inputs = model_inputs(batch)
    features = model.apply({"params": params}, **inputs, mtp=mtp, experts=chosen, method="features")
    head, mtp_nats = features.head, jnp.zeros(())
    if features.mtp_hidden is not None:
        mtp_nats = nats(model, features.mtp_hidden, head, targets(batch, 2))
    layers = features.layers.values()
    lesson = Lesson(*(jnp.zeros(()) for _ in Lesson._fields))
    for stats in layers:
        if stats.lesson is not None:
            lesson = jax.tree.map(lambda total, x: total + jnp.sum(x), lesson, stats.lesson)
    return Sums(
        next_token=nats(model, features.hidden, head, targets(batch, 1)),
        mtp=mtp_nats,
        balance=share * sum(jnp.sum(stats.balance_loss) for stats in layers),
        **lesson._asdict(),
        load={path: stats.load for path, stats in features.layers.items()},
        sinkhorn_error=jnp.max(jnp.stack([jnp.max(stats.sinkhorn_error) for stats in layers])),
    )


def _accumulate(gradient, trainable: dict, batch: Batch, parts: int) -> tuple[dict, Sums]:
    """Add up gradients and sums over micro-batches of interleaved rows.

    Interleaving keeps every device busy in each micro-batch: its rows are neighbours.
    """
    if parts == 1:
        return gradient(trainable, batch)
    parted = jax.tree.map(
        lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def add(before, rows):
        new = gradient(trainable, rows)
        gradients, sums = jax.tree.map(jnp.add, before, new)
        error = jnp.maximum(before[1].sinkhorn_error, new[1].sinkhorn_error)
        return (gradients, sums._replace(sinkhorn_error=error)), None

    # From zeros on, so that the gradient is compiled once.
    first = jax.tree.map(lambda x: x[0], parted)
    nothing = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, trainable, first)
    )
    return jax.lax.scan(add, nothing, parted)[0]
