"""The model of a stage of training, applied to batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, PartitionSpec

from dsv4_jax.collectives import sum_over
from dsv4_jax.loss import shifted_targets, token_nats
from dsv4_jax.model import Transformer
from dsv4_jax.optimizer import INDEXERS, LEARNERS, MODEL
from dsv4_jax.rounded_weights import round_weights
from dsv4_jax.run_config import DENSE, INDEXER, SPARSE, RunConfig, StageConfig
from dsv4_jax.shapes import Array, Float, Int
from dsv4_jax.sharding import BATCH_AXES
from dsv4_jax.train_state import param_specs

# "tokens", if packed "segment_ids" and "positions", and of chats "loss_mask": int32 [b, t];
# "experts" as `make_routing` returns them, for anticipatory routing
Batch = dict[str, Any]

MODEL_INPUTS = ("tokens", "segment_ids", "positions")  # of a batch


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


def abstract_inputs(stage: StageConfig) -> Batch:
    """Return the shapes and dtypes of what the model reads of a stage's batch."""
    tokens = jax.ShapeDtypeStruct((stage.rows, stage.seq_len), jnp.int32)
    return dict.fromkeys(MODEL_INPUTS, tokens)


def make_evaluation(
    config: RunConfig, stage: StageConfig, mesh: Mesh | None = None
) -> Callable[[dict, Batch], Float[Array, ""]]:
    """Return the function from parameters and batch to the nats of all predicted tokens."""
    model = transformer_of(config, stage, mesh)

    def score(params: dict, batch: Batch) -> Float[Array, ""]:
        inputs = model_inputs(batch)
        features = model.apply({"params": params}, **inputs, mtp=False, method="features")
        found = nats(model, features.hidden, features.head, targets(batch, 1))
        return sum_over(found, BATCH_AXES, mesh)

    return _on_rows(score, config, mesh, PartitionSpec())


def make_routing(
    config: RunConfig, stage: StageConfig, mesh: Mesh | None = None
) -> Callable[[dict, Batch], dict[str, Int[Array, "b ..."]]]:
    """Return the function from parameters and batch to the experts that these parameters choose.

    They are given by the path of the block, rows first, for all learned routers, and are the
    `experts` of a batch that `make_train_step` takes.
    """
    model = transformer_of(config, stage, mesh)

    def chosen(params: dict, batch: Batch) -> dict[str, Array]:
        features = model.apply({"params": params}, **model_inputs(batch), method="features")
        biased = {path[:-2] for path in flatten_dict(params) if path[-1] == "selection_bias"}
        return {
            path: rows_first(stats.experts).astype(jnp.int16)  # there are fewer than 2^15
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
            function, mesh=mesh, in_specs=(param_specs(config, mesh), PartitionSpec(BATCH_AXES)),
            out_specs=outputs, check_vma=False,
        )

    def run(params: dict, batch: Batch):
        return function(round_weights(params, config.model, config.runtime.linears), batch)

    return run


def model_inputs(batch: Batch) -> Batch:
    """Return what the model reads of a batch."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


def targets(batch: Batch, shift: int) -> tuple[Array, Array]:
    """Return the tokens so far ahead, and which of them are predicted."""
    return shifted_targets(
        batch["tokens"], batch.get("segment_ids"), shift, batch.get("loss_mask")
    )


def nats(
    model: Transformer, hidden: Array, head: Array, targets: tuple[Array, Array]
) -> Float[Array, ""]:
    """Return the cross-entropy of all targets, added up."""
    return token_nats(
        hidden, head, *targets, implementation=model.runtime.implementation("cross_entropy")
    )


def rows_first(experts: Int[Array, "*z b t a"]) -> Int[Array, "b *z t a"]:
    """Move the axis of stacked layers, if there is one, behind the rows, or back."""
    return experts if experts.ndim == 3 else jnp.swapaxes(experts, 0, 1)
