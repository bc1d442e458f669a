"""One optimizer step: losses, gradients over micro-batches, update, balance of the experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from dsv4_jax.attention.layout import document_offsets
from dsv4_jax.attention.lesson import Lesson
from dsv4_jax.collectives import max_over, sum_gradient, sum_over
from dsv4_jax.config import CSA
from dsv4_jax.flops import count_flops
from dsv4_jax.loss import shifted_targets, token_nats
from dsv4_jax.model import Transformer, init_params, param_shapes
from dsv4_jax.optimizer import (
    INDEXERS,
    LEARNERS,
    MODEL,
    Placed,
    decay_start,
    learner_of,
    learning_rate_schedule,
    make_optimizer,
)
from dsv4_jax.params import (
    Weight,
    kinds_of,
    merge,
    moment_split,
    shardings_of,
    split_trainable,
)
from dsv4_jax.rounded_weights import round_weights
from dsv4_jax.router import updated_bias
from dsv4_jax.run_config import DENSE, INDEXER, SPARSE, RunConfig, StageConfig
from dsv4_jax.schedule import by_layer
from dsv4_jax.shapes import Array, Float, Int
from dsv4_jax.sharding import BATCH_AXES, parts_of, replicated, spec_of
from pallas_kernels.implementation import XLA, implementation_of

# "tokens", if packed "segment_ids" and "positions", and of chats "loss_mask": int32 [b, t];
# "experts" as `make_routing` returns them, for anticipatory routing
Batch = dict[str, Any]
Metrics = dict[str, Array]  # scalars; under `LOAD` and a layer's name [e], of all experts

LOAD = "load/"  # starts the names of the layers' loads
MODEL_INPUTS = ("tokens", "segment_ids", "positions")  # of a batch
HELD_OUT = "held_out_bits_per_byte"  # name of the metric that an evaluation adds


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
    divergence: Float[Array, ""]  # of indexers from attention, over queries and layers, nats
    recall: Float[Array, ""]  # of the attention, by the choices of indexers, over the same
    choices: Float[Array, ""]  # how many these are
    load: dict[str, Array]  # token slots of each expert, by the path of the layer's block
    sinkhorn_error: Float[Array, ""]  # of all layers the largest, and so of micro-batches


def transformer_of(
    config: RunConfig, stage: StageConfig, mesh: Mesh | None = None, *, index_learns: bool = False
) -> Transformer:
    """Return the model of a run, on its mesh, with the attention of a stage."""
    runtime = dataclasses.replace(
        config.runtime, mesh=mesh, layout=config.mesh.layout, csa=stage.csa,
        index_learns=index_learns,
    )
    return Transformer(config.model, runtime)


def learners_of(stage: StageConfig) -> tuple[str, ...]:
    """Return who learns in a stage: the model, its indexers or both."""
    return {DENSE: (MODEL,), INDEXER: (INDEXERS,), SPARSE: LEARNERS}[stage.attention]


def init_state(
    config: RunConfig, mesh: Mesh | None = None, params: dict | None = None
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


def abstract_inputs(stage: StageConfig) -> Batch:
    """Return the shapes and dtypes of what the model reads of a stage's batch."""
    tokens = jax.ShapeDtypeStruct((stage.rows, stage.seq_len), jnp.int32)
    return dict.fromkeys(MODEL_INPUTS, tokens)


def state_shardings(config: RunConfig, mesh: Mesh | None) -> TrainState | None:
    """Return the placement of a state: the optimizer's moments are split further than parameters.

    Source: report 3 (ZeRO); fact sheet 7.
    """
    if mesh is None:
        return None
    shapes = _state_shapes(config)
    params = shardings_of(param_shapes(config.model), mesh, config.mesh.layout)
    moments = jax.tree.map(
        lambda split: NamedSharding(mesh, spec_of(split)), _moment_splits(config, mesh),
        is_leaf=_is_split,
    )
    opt_state = optax.tree_map_params(
        _optimizer_of(config),
        lambda moment, sharding: moment if _is_masked(moment) else sharding,
        shapes.opt_state, moments,
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=_is_masked,  # the place of a parameter that another optimizer updates
    )
    counter = replicated(mesh)
    return TrainState(counter, Skips(counter, counter), params, opt_state)


def _param_specs(config: RunConfig, mesh: Mesh) -> dict:
    """Return the partitions of the parameters."""
    placed = shardings_of(param_shapes(config.model), mesh, config.mesh.layout)
    return jax.tree.map(lambda sharding: sharding.spec, placed)


def _moment_splits(config: RunConfig, mesh: Mesh) -> dict:
    """Return how the moments of all leaves that can learn are split, and their gradients with them.
    """
    trainable = split_trainable(param_shapes(config.model))[0]
    return jax.tree.map(
        lambda weight: moment_split(weight, mesh, config.mesh.layout), trainable,
        is_leaf=lambda leaf: isinstance(leaf, Weight),
    )


def _is_split(leaf) -> bool:
    return isinstance(leaf, tuple)


def _is_masked(leaf) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _state_shapes(config: RunConfig) -> TrainState:
    params = nn.meta.unbox(param_shapes(config.model))
    opt_state = jax.eval_shape(_optimizer_of(config).init, split_trainable(params)[0])
    counter = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(counter, Skips(counter, counter), params, opt_state)


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
    optimizer = _optimizer_of(config, learners, mesh)
    schedule = learning_rate_schedule(config.optimizer, config.steps)
    indexers = config.model.layer_types.count(CSA)
    gradient_of = make_gradient(config, stage, mesh)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        trainable, fixed = split_trainable(state.params)
        rounded = round_weights(trainable, config.model, config.runtime.linears)
        learning, resting = _split_learning(rounded, learners)
        taken = state.step - state.skips.total
        learning_rate = schedule(taken)
        if stage.learning_rate is not None:
            learning_rate = jnp.float32(stage.learning_rate)
        counts = jnp.maximum(_count_targets(batch, config.model.csa_ratio), 1)
        weights = _loss_weights(config, stage, taken) / counts

        gradients, sums = gradient_of(learning, merge(resting, fixed), batch, weights)
        updates, opt_state = optimizer.update(
            merge(gradients, jax.tree.map(jnp.zeros_like, resting)), state.opt_state, trainable,
            learning_rate=learning_rate,
        )
        params = merge(optax.apply_updates(trainable, updates), fixed)
        if MODEL in learners:
            params = _rebalance(params, sums.load, train.bias_update_rate)
        norms = {learner: optax.tree.norm(_split_learning(gradients, (learner,))[0])
                 for learner in learners}
        skips = state.skips
        if train.skip_non_finite:
            finite = jnp.isfinite(sum(norms.values(), _total(weights, sums)))
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


def make_gradient(
    config: RunConfig, stage: StageConfig, mesh: Mesh | None
) -> Callable[[dict, dict, Batch, Array], tuple[dict, Sums]]:
    """Return the function to the gradient of a batch's objective and the sums that make it up.

    Of the leaves that learn, of all others, a batch, and the weights of `_loss_weights`. On a mesh
    every device runs the model on its rows; a gradient is then added up over the devices that hold
    the same part of the leaf.
    """
    learners = learners_of(stage)
    model = transformer_of(config, stage, mesh, index_learns=INDEXERS in learners)
    share = 1 / stage.accumulation
    if mesh is not None:
        share /= parts_of(BATCH_AXES, mesh)

    def objective(learning: dict, others: dict, rows: Batch, weights: Array):
        sums = _forward(model, merge(learning, others), rows, share, mtp=MODEL in learners)
        return _total(weights, sums), sums

    def gradient(learning: dict, others: dict, batch: Batch, weights: Array):
        def of_rows(learning, rows):
            return jax.grad(objective, has_aux=True)(learning, others, rows, weights)

        return _accumulate(of_rows, learning, batch, stage.accumulation)

    if mesh is None:
        return gradient
    trainable, fixed = split_trainable(_param_specs(config, mesh))
    learning, resting = _split_learning(trainable, learners)
    splits = _split_learning(_moment_splits(config, mesh), learners)[0]

    def on_device(parts: dict, others: dict, batch: Batch, weights: Array):
        # Devices along "tensor" work on the same rows: their objectives add up to one.
        gradients, sums = gradient(parts, others, batch, weights / mesh.shape["tensor"])
        gradients = jax.tree.map(partial(sum_gradient, mesh=mesh), gradients, learning, splits)
        return gradients, _sum_up(sums, mesh)

    rows, summed = PartitionSpec(BATCH_AXES), jax.tree.map(spec_of, splits, is_leaf=_is_split)
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(learning, merge(resting, fixed), rows, PartitionSpec()),
        out_specs=(summed, PartitionSpec()), check_vma=False,
    )


def _sum_up(sums: Sums, mesh: Mesh | None) -> Sums:
    """Add up what devices have found in their rows."""
    error = max_over(sums.sinkhorn_error, BATCH_AXES, mesh)
    return sum_over(sums, BATCH_AXES, mesh)._replace(sinkhorn_error=error)


def _loss_weights(
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


def _total(weights: Float[Array, " losses"], sums: Sums) -> Float[Array, ""]:
    return jnp.dot(weights, jnp.stack(sums[: len(weights)]))


def _split_learning(trainable: dict, learners: Collection[str]) -> tuple[dict, dict]:
    """Split a tree like the trainable parameters into the leaves that learn and the rest."""
    flat = flatten_dict(trainable)
    learning = {path: leaf for path, leaf in flat.items() if learner_of(path) in learners}
    resting = {path: leaf for path, leaf in flat.items() if path not in learning}
    return unflatten_dict(learning), unflatten_dict(resting)


def _select(condition: Array, new, old):
    """Return the new tree where the condition holds, else the old one."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def make_evaluation(
    config: RunConfig, stage: StageConfig, mesh: Mesh | None = None
) -> Callable[[dict, Batch], Float[Array, ""]]:
    """Return the function from parameters and batch to the nats of all predicted tokens."""
    model = transformer_of(config, stage, mesh)

    def nats(params: dict, batch: Batch) -> Float[Array, ""]:
        inputs = _model_inputs(batch)
        features = model.apply({"params": params}, **inputs, mtp=False, method="features")
        found = _nats(model, features.hidden, features.head, _targets(batch, 1))
        return sum_over(found, BATCH_AXES, mesh)

    return _on_rows(nats, config, mesh, PartitionSpec())


def make_routing(
    config: RunConfig, stage: StageConfig, mesh: Mesh | None = None
) -> Callable[[dict, Batch], dict[str, Int[Array, "b ..."]]]:
    """Return the function from parameters and batch to the experts that these parameters choose.

    They are given by the path of the block, rows first, for all learned routers, and are the
    `experts` of a batch that `make_train_step` takes.
    """
    model = transformer_of(config, stage, mesh)

    def chosen(params: dict, batch: Batch) -> dict[str, Array]:
        features = model.apply({"params": params}, **_model_inputs(batch), method="features")
        biased = {path[:-2] for path in flatten_dict(params) if path[-1] == "selection_bias"}
        return {
            path: _rows_first(stats.experts).astype(jnp.int16)  # there are fewer than 2^15
            for path, stats in features.layers.items() if tuple(path.split("/")) in biased
        }

    return _on_rows(chosen, config, mesh, PartitionSpec(BATCH_AXES))


def _on_rows(
    function: Callable, config: RunConfig, mesh: Mesh | None, outputs: PartitionSpec
) -> Callable:
    """Round the parameters, then run a function of them and a batch; on each device, for its rows.
    """
    if mesh is not None:
        function = jax.shard_map(
            function, mesh=mesh, in_specs=(_param_specs(config, mesh), PartitionSpec(BATCH_AXES)),
            out_specs=outputs, check_vma=False,
        )

    def run(params: dict, batch: Batch):
        return function(round_weights(params, config.model, config.runtime.linears), batch)

    return run


def _model_inputs(batch: Batch) -> Batch:
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


def _targets(batch: Batch, shift: int) -> tuple[Array, Array]:
    return shifted_targets(
        batch["tokens"], batch.get("segment_ids"), shift, batch.get("loss_mask")
    )


def _nats(
    model: Transformer, hidden: Array, head: Array, targets: tuple[Array, Array]
) -> Float[Array, ""]:
    return token_nats(
        hidden, head, *targets, implementation=model.runtime.implementation("cross_entropy")
    )


def _rows_first(experts: Int[Array, "*z b t a"]) -> Int[Array, "b *z t a"]:
    """Move the axis of stacked layers, if there is one, behind the rows, or back."""
    return experts if experts.ndim == 3 else jnp.swapaxes(experts, 0, 1)


def _optimizer_of(
    config: RunConfig, learners: Collection[str] = LEARNERS, mesh: Mesh | None = None
) -> optax.GradientTransformationExtraArgs:
    kinds = split_trainable(kinds_of(param_shapes(config.model)))[0]
    placed = None if mesh is None else Placed(mesh, _moment_splits(config, mesh))
    implementation = implementation_of("newton_schulz", config.runtime.kernels)
    return make_optimizer(config.optimizer, kinds, learners, implementation, placed)


def as_counted(config: RunConfig) -> RunConfig:
    """Return the run whose operations count: none done twice, none inside a kernel."""
    runtime = dataclasses.replace(config.runtime, remat=False, kernels=XLA)
    return dataclasses.replace(config, runtime=runtime)


def optimizer_flops(config: RunConfig, stage: StageConfig) -> int:
    """Return the operations in matrix products of one update, which are all Muon's."""
    config = as_counted(config)
    shapes = _state_shapes(config)
    trainable = split_trainable(shapes.params)[0]
    update = partial(_optimizer_of(config, learners_of(stage)).update, learning_rate=1.0)
    return count_flops(update, trainable, shapes.opt_state, trainable).matmul


def _count_targets(batch: Batch, ratio: int) -> Float[Array, " losses"]:
    """Count the terms of each loss of `_loss_weights`.

    These are the tokens predicted by the main head and by multi-token prediction, 1, and the
    tokens whose document has a complete block of `ratio` tokens, which an indexer scores.
    """
    tokens, segments = batch["tokens"], batch.get("segment_ids")
    predicted = [jnp.sum(_targets(batch, shift)[1]) for shift in (1, 2)]
    if segments is None:
        scored = tokens.shape[0] * max(tokens.shape[1] - ratio + 1, 0)
    else:
        scored = jnp.sum((document_offsets(segments) >= ratio - 1) & (segments > 0))
    return jnp.array([*predicted, 1, scored], jnp.float32)


def _forward(model: Transformer, params: dict, batch: Batch, share: float, mtp: bool) -> Sums:
    """Run the model on a micro-batch, which is this share of the batch."""
    chosen = {
        path: _rows_first(experts).astype(jnp.int32)
        for path, experts in batch.get("experts", {}).items()
    }
    inputs = _model_inputs(batch)
    features = model.apply({"params": params}, **inputs, mtp=mtp, experts=chosen, method="features")
    head, mtp_nats = features.head, jnp.zeros(())
    if features.mtp_hidden is not None:
        mtp_nats = _nats(model, features.mtp_hidden, head, _targets(batch, 2))
    layers = features.layers.values()
    lesson = Lesson(*(jnp.zeros(()) for _ in Lesson._fields))
    for stats in layers:
        if stats.lesson is not None:
            lesson = jax.tree.map(lambda total, x: total + jnp.sum(x), lesson, stats.lesson)
    return Sums(
        next_token=_nats(model, features.hidden, head, _targets(batch, 1)),
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

    def add(total, rows):
        new = gradient(trainable, rows)
        gradients, sums = jax.tree.map(jnp.add, total, new)
        error = jnp.maximum(total[1].sinkhorn_error, new[1].sinkhorn_error)
        return (gradients, sums._replace(sinkhorn_error=error)), None

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


def _relative_loads(config: RunConfig, load: dict[str, Array]) -> dict[str, Array]:
    """Return the load of each expert over the mean of its layer, by the layer's name.

    Of a layer without tokens, as multi-token prediction may be, the loads are 0.
    """
    return {
        layer: slots * slots.size / jnp.maximum(jnp.sum(slots), 1)
        for layer, slots in by_layer(config.model, load).items()
    }
