"""One optimizer step: losses, gradients over micro-batches, update, balance of the experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, SingleDeviceSharding

from dsv4_jax.loss import shifted_targets, token_nats
from dsv4_jax.model import Transformer, init_params, param_shapes
from dsv4_jax.optimizer import (
    FROZEN,
    decay_start,
    label_leaves,
    learning_rate_schedule,
    make_optimizer,
)
from dsv4_jax.params import kinds_of, merge, split_trainable
from dsv4_jax.rounded_weights import round_weights
from dsv4_jax.router import updated_bias
from dsv4_jax.run_config import RunConfig
from dsv4_jax.shapes import Array, Float
from dsv4_jax.sharding import replicated, shardings_of

Batch = dict[str, Array]  # "tokens" and, if packed, "segment_ids" and "positions": int32 [b, t]
Metrics = dict[str, Array]  # float32 scalars


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


class Sums(NamedTuple):
    """What micro-batches add up to."""

    next_token: Float[Array, ""]  # nats
    mtp: Float[Array, ""]  # nats
    balance: Float[Array, ""]  # over layers, weighted by the micro-batch's share of the rows
    load: dict[str, Array]  # token slots of each expert, by the path of the layer's block


def transformer_of(config: RunConfig, mesh: Mesh | None = None) -> Transformer:
    """Return the model of a run, on its mesh."""
    return Transformer(config.model, dataclasses.replace(config.runtime, mesh=mesh))


def init_state(config: RunConfig, mesh: Mesh | None = None) -> TrainState:
    """Make the state that a run starts from; on a mesh it is born sharded, never whole."""
    params = init_params(config.model, jax.random.key(config.train.seed), mesh)
    placed = state_shardings(config, mesh)
    opt_placed, counter = (None, None) if mesh is None else (placed.opt_state, placed.step)
    init = jax.jit(_optimizer_of(config).init, out_shardings=opt_placed)
    step, total, in_row = (jax.device_put(jnp.int32(0), counter) for _ in range(3))
    return TrainState(step, Skips(total, in_row), params, init(split_trainable(params)[0]))


def abstract_state(config: RunConfig, mesh: Mesh | None = None) -> TrainState:
    """Return the shapes, dtypes and placement of a run's state; nothing is computed."""
    shapes = _state_shapes(config)
    if mesh is None:
        placed = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), shapes)
    else:
        placed = state_shardings(config, mesh)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes, placed,
    )


def state_shardings(config: RunConfig, mesh: Mesh | None) -> TrainState | None:
    """Return the placement of a state: the optimizer's moments lie as their parameters do."""
    if mesh is None:
        return None
    shapes = _state_shapes(config)
    params = shardings_of(param_shapes(config.model), mesh)
    opt_state = optax.tree_map_params(
        _optimizer_of(config),
        lambda moment, sharding: moment if _is_masked(moment) else sharding,
        shapes.opt_state, split_trainable(params)[0],
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=_is_masked,  # the place of a parameter that another optimizer updates
    )
    counter = replicated(mesh)
    return TrainState(counter, Skips(counter, counter), params, opt_state)


def _is_masked(leaf) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _state_shapes(config: RunConfig) -> TrainState:
    params = nn.meta.unbox(param_shapes(config.model))
    opt_state = jax.eval_shape(_optimizer_of(config).init, split_trainable(params)[0])
    counter = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(counter, Skips(counter, counter), params, opt_state)


def make_train_step(
    config: RunConfig, mesh: Mesh | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Return the function that takes one optimizer step; jit it, donating the state.

    The objective is the mean next-token loss, plus mtp_weight times that of multi-token
    prediction, plus balance_weight times the sum of the layers' sequence balance losses. With
    micro-batches the gradient is exactly that of the whole batch. It is taken at the weights that
    `runtime.linears` rounds, and moves the unrounded ones.

    A batch whose objective or gradient is not finite moves nothing, the place in the schedule
    included, and is counted; `train.skip_non_finite` says whether.
    """
    model, train = transformer_of(config, mesh), config.train
    optimizer = _optimizer_of(config)
    labels = label_leaves(_trainable_kinds(config), config.optimizer)
    schedule = learning_rate_schedule(config.optimizer, train.steps)
    decays_from = decay_start(config.optimizer, train.steps)
    placed = None if mesh is None else split_trainable(state_shardings(config, mesh).params)[0]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        trainable, frozen = split_trainable(state.params)
        rounded = round_weights(trainable, config.model, config.runtime.linears)
        if mesh is not None:
            rounded = jax.lax.with_sharding_constraint(rounded, placed)
        targets = jnp.maximum(_count_targets(batch), 1)
        taken = state.step - state.skips.total
        mtp_weight = jnp.where(taken < decays_from, train.mtp_weight, train.mtp_weight_in_decay)
        weights = jnp.array([1, mtp_weight, train.balance_weight]) / jnp.array([*targets, 1])

        def objective(trainable, rows):
            sums = _forward(model, merge(trainable, frozen), rows, 1 / train.accumulation)
            return jnp.dot(weights, jnp.stack(sums[:3])), sums

        def gradient(trainable, rows):
            gradients, sums = jax.grad(objective, has_aux=True)(trainable, rows)
            if mesh is not None:
                # Here each device already keeps its own part alone of the sum over devices.
                gradients = jax.lax.with_sharding_constraint(gradients, placed)
            return gradients, sums

        gradients, sums = _accumulate(gradient, rounded, batch, train.accumulation)
        updates, opt_state = optimizer.update(gradients, state.opt_state, trainable)
        params = merge(optax.apply_updates(trainable, updates), frozen)
        params = _rebalance(params, sums.load, train.bias_update_rate)
        norm = _trained_norm(gradients, labels)
        skips = state.skips
        if train.skip_non_finite:
            finite = jnp.isfinite(jnp.dot(weights, jnp.stack(sums[:3]))) & jnp.isfinite(norm)
            params = _select(finite, params, state.params)
            opt_state = _select(finite, opt_state, state.opt_state)
            skips = Skips(skips.total + ~finite, jnp.where(finite, 0, skips.in_row + 1))
        metrics = {
            "loss": sums.next_token / targets[0],
            "mtp_loss": sums.mtp / targets[1],
            "balance_loss": sums.balance,
            "grad_norm": norm,
            "learning_rate": schedule(taken),
            "max_load": _max_load(sums.load),
            "skipped": skips.total,
            "skipped_in_row": skips.in_row,
        }
        return TrainState(state.step + 1, skips, params, opt_state), metrics

    return step


def _select(condition: Array, new, old):
    """Return the new tree where the condition holds, else the old one."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def make_evaluation(
    config: RunConfig, mesh: Mesh | None = None
) -> Callable[[dict, Batch], Float[Array, ""]]:
    """Return the function from parameters and batch to the nats of all predicted tokens."""
    model = transformer_of(config, mesh)

    def evaluate(params: dict, batch: Batch) -> Float[Array, ""]:
        params = round_weights(params, config.model, config.runtime.linears)
        features = model.apply({"params": params}, **batch, mtp=False, method="features")
        targets = shifted_targets(batch["tokens"], batch.get("segment_ids"), 1)
        return token_nats(features.hidden, params["head"], *targets)

    return evaluate


def _optimizer_of(config: RunConfig) -> optax.GradientTransformationExtraArgs:
    return make_optimizer(config.optimizer, _trainable_kinds(config), config.train.steps)


def _trainable_kinds(config: RunConfig) -> dict:
    return split_trainable(kinds_of(param_shapes(config.model)))[0]


def _count_targets(batch: Batch) -> Float[Array, " two"]:
    """Count the tokens predicted by the main head and by multi-token prediction."""
    tokens, segments = batch["tokens"], batch.get("segment_ids")
    return jnp.stack([jnp.sum(shifted_targets(tokens, segments, shift)[1]) for shift in (1, 2)])


def _forward(model: Transformer, params: dict, batch: Batch, share: float) -> Sums:
    """Run the model on a micro-batch, which is this share of the batch."""
    features = model.apply({"params": params}, **batch, method="features")
    tokens, segments = batch["tokens"], batch.get("segment_ids")
    head, mtp = params["head"], jnp.zeros(())
    if features.mtp_hidden is not None:
        mtp = token_nats(features.mtp_hidden, head, *shifted_targets(tokens, segments, 2))
    return Sums(
        next_token=token_nats(features.hidden, head, *shifted_targets(tokens, segments, 1)),
        mtp=mtp,
        balance=share * sum(jnp.sum(stats.balance_loss) for stats in features.router.values()),
        load={path: stats.load for path, stats in features.router.items()},
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

    def add(total, rows):
        return jax.tree.map(jnp.add, total, gradient(trainable, rows)), None

    first, rest = (jax.tree.map(lambda x, i=i: x[i], parted) for i in (0, slice(1, None)))
    return jax.lax.scan(add, gradient(trainable, first), rest)[0]


def _rebalance(params: dict, load: dict[str, Array], rate: float) -> dict:
    """Move every selection bias towards even load."""
    flat = flatten_dict(params)
    for block, slots in load.items():
        path = (*block.split("/"), "moe", "selection_bias")
        if path in flat:
            flat[path] = updated_bias(flat[path], slots, rate)
    return unflatten_dict(flat)


def _trained_norm(gradients: dict, labels: dict) -> Float[Array, ""]:
    kept = jax.tree.map(lambda g, label: None if label == FROZEN else g, gradients, labels)
    return optax.tree.norm(kept)


def _max_load(load: dict[str, Array]) -> Float[Array, ""]:
    """Return the load of the busiest expert of any layer over the mean load; 1 is even."""
    return jnp.max(jnp.stack([
        jnp.max(jnp.max(slots, axis=-1) / jnp.mean(slots, axis=-1)) for slots in load.values()
    ]))
