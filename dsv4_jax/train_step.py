"""One optimizer step: gradient, update, balance of the experts, metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from dsv4_jax.attention.layout import document_offsets
from dsv4_jax.config import CSA
from dsv4_jax.flops import Flops, count_flops
from dsv4_jax.gradient import make_gradient, split_learning, total
from dsv4_jax.optimizer import INDEXERS, MODEL, decay_start, learning_rate_schedule
from dsv4_jax.params import merge, split_trainable
from dsv4_jax.rounded_weights import round_weights
from dsv4_jax.router import updated_bias
from dsv4_jax.run_config import INDEXER, RunConfig, StageConfig
from dsv4_jax.schedule import by_layer
from dsv4_jax.shapes import Array, Float
from dsv4_jax.stage_model import Batch, learners_of, targets
from dsv4_jax.train_state import Skips, TrainState, optimizer_of, state_shapes
from pallas_kernels.implementation import XLA

Metrics = dict[str, Array]  # scalars; under `LOAD` and a layer's name [e], of all experts

LOAD = "load/"  # starts the names of the layers' loads
HELD_OUT = "held_out_bits_per_byte"  # name of the metric that an evaluation adds


def make_train_step(
    config: RunConfig, stage: StageConfig, mesh: Mesh | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Return the function that takes one optimizer step of a stage; jit it, donating the state.

    The model's objective is the mean next-token loss, plus mtp_weight times that of multi-token
    prediction, plus balance_weight times the sum of the layers' sequence balance losses. The
    objective of the indexers is the sum over their layers of the mean divergence from the
    attention of what they score. No parameter has a gradient from both. With micro-batches the
    gradient is exactly that of the whole batch. It is taken at the weights that `runtime.linears`
    rounds, and moves the unrounded ones.

    A batch whose objective or gradient is not finite moves nothing, the place in the schedule
    included, and is counted; `train.skip_non_finite` says whether.

    The load of an expert is told as a multiple of its layer's mean: 1 is even.
    """
    train, learners = config.train, learners_of(stage)
    optimizer = optimizer_of(config, learners, mesh)
    schedule = learning_rate_schedule(config.optimizer, config.steps)
    indexers = config.model.layer_types.count(CSA)
    gradient_of = make_gradient(config, stage, mesh)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        trainable, fixed = split_trainable(state.params)
        rounded = round_weights(trainable, config.model, config.runtime.linears)
        learning, resting = split_learning(rounded, learners)
        taken = state.step - state.skips.total
        learning_rate = schedule(taken)
        if stage.learning_rate is not None:
            learning_rate = jnp.float32(stage.learning_rate)
        counts = jnp.maximum(_count_targets(batch, config.model.csa_ratio), 1)
        weights = loss_weights(config, stage, taken) / counts

        gradients, sums = gradient_of(learning, merge(resting, fixed), batch, weights)
        updates, opt_state = optimizer.update(
            merge(gradients, jax.tree.map(jnp.zeros_like, resting)), state.opt_state, trainable,
            learning_rate=learning_rate,
        )
        params = merge(optax.apply_updates(trainable, updates), fixed)
        if MODEL in learners:
            params = _rebalance(params, sums.load, train.bias_update_rate)
        norms = {learner: optax.tree.norm(split_learning(gradients, (learner,))[0])
                 for learner in learners}
        skips = state.skips
        if train.skip_non_finite:
            finite = jnp.isfinite(sum(norms.values(), total(weights, sums)))
            params = _select(finite, params, state.params)
            opt_state = _select(finite, opt_state, state.opt_state)
            skips = Skips(skips.total + ~finite, jnp.where(finite, 0, skips.in_row + 1))
        loads = _relative_loads(config, sums.load)
        metrics = {
            "loss": sums.next_token / counts[0],
            "learning_rate": learning_rate,
            "max_load": jnp.max(jnp.stack([*loads.values()])),
            "sinkhorn_error": sums.sinkhorn_error,
            "skipped": skips.total,
            "skipped_in_row": skips.in_row,
            **{LOAD + layer: load for layer, load in loads.items()},
        }
        if MODEL in learners:
            metrics["mtp_loss"] = sums.mtp / counts[1]
            metrics["balance_loss"] = sums.balance
            metrics["grad_norm"] = norms[MODEL]
        if INDEXERS in learners and indexers:
            metrics["index_loss"] = sums.divergence / counts[3] / indexers
            metrics["index_grad_norm"] = norms[INDEXERS]
        if stage.attention == INDEXER:
            metrics["index_recall"] = sums.recall / jnp.maximum(sums.choices, 1)
        return TrainState(state.step + 1, skips, params, opt_state), metrics

    return step


def loss_weights(
    config: RunConfig, stage: StageConfig, taken: Array
) -> Float[Array, " losses"]:
    """Return the weights of the first `Sums`: next token, multi-token, balance, divergence."""
    train, learners = config.train, learners_of(stage)
    mtp_weight = stage.mtp_weight
    if mtp_weight is None:
        decays = taken >= decay_start(config.optimizer, config.steps)
        mtp_weight = jnp.where(decays, train.mtp_weight_in_decay, train.mtp_weight)
    model = jnp.array([1, mtp_weight, train.balance_weight]) * (MODEL in learners)
    return jnp.append(model, float(INDEXERS in learners))


def _count_targets(batch: Batch, ratio: int) -> Float[Array, " losses"]:
    """Count the terms of each loss of `loss_weights`.

    These are the tokens predicted by the main head and by multi-token prediction, 1, and the
    tokens whose document has a complete block of `ratio` tokens, which an indexer scores.
    """
    tokens, segments = batch["tokens"], batch.get("segment_ids")
    predicted = [jnp.sum(targets(batch, shift)[1]) for shift in (1, 2)]
    if segments is None:
        scored = tokens.shape[0] * max(tokens.shape[1] - ratio + 1, 0)
    else:
        scored = jnp.sum((document_offsets(segments) >= ratio - 1) & (segments > 0))
    return jnp.array([*predicted, 1, scored], jnp.float32)


def _select(condition: Array, new, old):
    """Return the new tree where the condition holds, else the old one."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _rebalance(params: dict, load: dict[str, Array], rate: float) -> dict:
    """Move every selection bias towards even load."""
    flat = flatten_dict(params)
    for block, slots in load.items():
        path = (*block.split("/"), "moe", "selection_bias")
        if path in flat:
            flat[path] = updated_bias(flat[path], slots, rate)
    return unflatten_dict(flat)


def _relative_loads(config: RunConfig, load: dict[str, Array]) -> dict[str, Array]:
    """Return the load of each expert over the mean of its layer, by the layer's name.

    Of a layer without tokens, as multi-token prediction may be, the loads are 0.
    """
    return {
        layer: slots * slots.size / jnp.maximum(jnp.sum(slots), 1)
        for layer, slots in by_layer(config.model, load).items()
    }


def as_counted(config: RunConfig) -> RunConfig:
    """Return the run whose operations count: none done twice, none inside a kernel."""
    runtime = dataclasses.replace(config.runtime, remat=False, kernels=XLA)
    return dataclasses.replace(config, runtime=runtime)


def step_flops(config: RunConfig, stage: StageConfig, state: TrainState, batch: Batch) -> Flops:
    """Return the operations of a step, of one device with everything.

    What devices do alike counts once.

    Args:
      state, batch: arrays, or their shapes and dtypes; where they are does not matter.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, batch))
    return count_flops(make_train_step(as_counted(config), stage), *shapes)


def optimizer_flops(config: RunConfig, stage: StageConfig) -> int:
    """Return the operations in matrix products of one update, which are all Muon's."""
    config = as_counted(config)
    shapes = state_shapes(config)
    trainable = split_trainable(shapes.params)[0]
    update = partial(optimizer_of(config, learners_of(stage)).update, learning_rate=1.0)
    return count_flops(update, trainable, shapes.opt_state, trainable).matmul
