"""The objective of a training step, against the sum of losses that the report states."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_jit
from flax.traverse_util import flatten_dict, unflatten_dict

from dsv4_jax.flops import count_flops
from dsv4_jax.params import merge, split_trainable
from dsv4_jax.run_config import INDEXER, SPARSE, RunConfig
from dsv4_jax.stage_model import make_evaluation, transformer_of
from dsv4_jax.train_state import abstract_state, init_state
from dsv4_jax.train_step import LOAD, make_train_step, optimizer_flops

ROUNDING = 1e-5  # ratio: the same float32 sums in another order
STEPS, DECAY_START = 10, 6
MTP_WEIGHT, MTP_WEIGHT_IN_DECAY, BALANCE_WEIGHT, BIAS_RATE = 0.3, 0.1, 0.5, 0.01

CONFIG = RunConfig.from_config_dict({
    "model": {
        "vocab_size": 32, "hidden_size": 16, "layer_types": ["window"] + ["csa", "hca"] * 2,
        "moe_types": ["hash"] + ["learned"] * 4, "num_attention_heads": 4, "head_dim": 8,
        "qk_rope_head_dim": 4, "q_lora_rank": 8, "o_groups": 2, "o_lora_rank": 4,
        "sliding_window": 4, "csa_ratio": 2, "hca_ratio": 4, "index_n_heads": 4,
        "index_head_dim": 8, "index_topk": 2, "yarn_original_positions": 16,
        "max_position_embeddings": 256, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 8, "hc_mult": 2, "hc_sinkhorn_iters": 3,
    },
    "stages": {
        "stage1": {
            "tokens": STEPS * 32, "seq_len": 16, "batch_tokens": 32, "attention": "dense",
        },
    },
    "optimizer": {
        "name": "adamw", "learning_rate": 1e-3, "end_learning_rate": 1e-4, "warmup_steps": 1,
        "decay_fraction": 1 - DECAY_START / STEPS, "clip_norm": 1e9,
    },
    "train": {
        "eval_every": 10, "checkpoint_every": 10, "mtp_weight": MTP_WEIGHT,
        "mtp_weight_in_decay": MTP_WEIGHT_IN_DECAY, "balance_weight": BALANCE_WEIGHT,
        "bias_update_rate": BIAS_RATE,
    },
})  # fmt: skip
BATCH = {
    "tokens": np.random.default_rng(0).integers(0, 32, (2, 16)).astype(np.int32),
    "segment_ids": np.array([[1] * 9 + [2] * 7, [5] * 2 + [3] * 10 + [0] * 4], np.int32),
}


def mean_nats(logits: jax.Array, shift: int, learned=None) -> jax.Array:
    """Average -log p of the token `shift` places on over places whose document reaches so far.

    With `learned` it is over the places whose token so far on is learned.
    """
    log_p, segments = jax.nn.log_softmax(logits), BATCH["segment_ids"]
    places = [
        (row, t) for row, t in np.ndindex(segments.shape[0], segments.shape[1] - shift)
        if segments[row, t] == segments[row, t + shift] > 0
        and (learned is None or learned[row, t + shift])
    ]
    row, t = map(np.array, zip(*places, strict=True))
    return -jnp.mean(log_p[row, t, BATCH["tokens"][row, t + shift]])


def objective(trainable, frozen, mtp_weight: float, stage=CONFIG.stages[0], learned=None):
    """Return the loss, and its parts with the features."""
    params = {"params": merge(trainable, frozen)}
    features = transformer_of(CONFIG, stage).apply(params, **BATCH, method="features")
    main = mean_nats(features.logits, 1, learned)
    mtp = mean_nats(features.mtp_logits, 2, learned)
    balance = sum(jnp.sum(stats.balance_loss) for stats in features.layers.values())
    return main + mtp_weight * mtp + BALANCE_WEIGHT * balance, (main, mtp, balance, features)


def means_of(state, learner: str) -> dict:
    """Return AdamW's means of gradients of who learns by it."""
    return state.opt_state[-1].inner_states[f"{learner} adamw"].inner_state[0].mu


@pytest.fixture(scope="module")
def state():
    """A state whose gates and biases are away from their symmetric start."""
    state, choose = init_state(CONFIG), np.random.default_rng(1)
    trainable, frozen = split_trainable(state.params)
    moved = jax.tree.map(
        lambda w: w + 0.1 * choose.normal(size=w.shape).astype(np.float32), trainable
    )
    return state._replace(params=merge(moved, frozen))


@pytest.fixture(scope="module")
def step():
    return quick_jit(make_train_step(CONFIG, CONFIG.stages[0]))


@pytest.fixture(scope="module")
def gradient():
    return quick_jit(jax.grad(objective, has_aux=True))


@pytest.mark.parametrize(
    "taken, mtp_weight", [(DECAY_START - 1, MTP_WEIGHT), (DECAY_START, MTP_WEIGHT_IN_DECAY)]
)
def test_a_step_descends_the_stated_objective(state, step, gradient, taken, mtp_weight):
    after, metrics = step(state._replace(step=jnp.int32(taken)), BATCH)
    expected, parts = gradient(*split_trainable(state.params), mtp_weight)
    for name, part in zip(("loss", "mtp_loss", "balance_loss"), parts, strict=False):
        np.testing.assert_allclose(metrics[name], part, rtol=ROUNDING)
    assert_descended(after, expected)


def assert_descended(after, expected) -> None:
    """Compare the gradient that a fresh AdamW has taken for the model with another one."""
    moments = flatten_dict(means_of(after, "model"))  # 0.1 g
    largest = max(float(np.linalg.norm(g)) for g in jax.tree.leaves(expected))
    compared = 0
    for path, wanted in flatten_dict(expected).items():
        if "indexer" not in path:  # frozen
            error = np.linalg.norm(moments[path] / 0.1 - wanted)
            assert error <= ROUNDING * largest, path
            compared += 1
    assert compared > 50


@pytest.mark.parametrize("attention", ["dense", "indexer", "sparse"])
def test_muons_operations_are_those_that_it_adds_to_a_step(attention):
    stage = dataclasses.replace(CONFIG.stages[0], attention=attention)
    counts = []
    for name in ("muon", "adamw"):
        config = dataclasses.replace(
            CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, name=name)
        )
        step = make_train_step(config, stage)
        counts.append(count_flops(step, abstract_state(config), BATCH).matmul)
    muon = dataclasses.replace(
        CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, name="muon")
    )
    assert optimizer_flops(muon, stage) == counts[0] - counts[1] > 0
    assert optimizer_flops(CONFIG, stage) == 0  # AdamW


@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.heavy)])
def test_a_loss_mask_leaves_the_loss_of_what_is_learned(state, parts):
    """Also where micro-batches learn different numbers of tokens."""
    learned = np.random.default_rng(3).integers(0, 2, (2, 16)).astype(np.int32)
    learned[1] = 0
    learned[1, 5] = 1
    stage = dataclasses.replace(CONFIG.stages[0], accumulation=parts)
    batch = BATCH | {"loss_mask": learned}
    after, metrics = quick_jit(make_train_step(CONFIG, stage))(state, batch)
    gradient = quick_jit(jax.grad(
        lambda *trees: objective(*trees, MTP_WEIGHT, learned=learned), has_aux=True
    ))
    expected, losses = gradient(*split_trainable(state.params))
    for name, part in zip(("loss", "mtp_loss", "balance_loss"), losses, strict=False):
        np.testing.assert_allclose(metrics[name], part, rtol=ROUNDING)
    assert_descended(after, expected)
    nats = quick_jit(make_evaluation(CONFIG, stage))(state.params, batch)
    count = sum(
        learned[row, t + 1] for row, t in np.ndindex(2, 15)
        if BATCH["segment_ids"][row, t] == BATCH["segment_ids"][row, t + 1] > 0
    )
    np.testing.assert_allclose(nats, losses[0] * count, rtol=ROUNDING)


@pytest.mark.parametrize("attention", [pytest.param(INDEXER, marks=pytest.mark.heavy), SPARSE])
def test_indexers_learn_from_the_attention_alone_and_the_model_from_language(state, attention):
    """In one backward pass: each has the gradient that it has from its own loss alone."""
    stage = dataclasses.replace(CONFIG.stages[0], attention=attention)
    after, metrics = quick_jit(make_train_step(CONFIG, stage))(state, BATCH)
    model = transformer_of(CONFIG, stage, index_learns=True)
    scored = sum(
        max(count - CONFIG.model.csa_ratio + 1, 0) for row in BATCH["segment_ids"]
        for segment, count in zip(*np.unique(row, return_counts=True), strict=True) if segment
    )

    def divergence(trainable, frozen):
        features = model.apply({"params": merge(trainable, frozen)}, **BATCH, method="features")
        lessons = [stats.lesson for stats in features.layers.values() if stats.lesson is not None]
        return sum(jnp.sum(lesson.divergence) for lesson in lessons) / scored

    def language(trainable, frozen):
        return objective(trainable, frozen, MTP_WEIGHT, stage)[0]

    split = split_trainable(state.params)
    (total, of_indexers), of_model = (
        quick_jit(jax.value_and_grad(divergence))(*split), quick_jit(jax.grad(language))(*split)
    )
    np.testing.assert_allclose(metrics["index_loss"], total / 2, rtol=ROUNDING)  # two layers
    means = [flatten_dict(means_of(after, learner)) for learner in ("indexers", "model")]
    for path, wanted in flatten_dict(of_indexers).items():
        if "indexer" in path:
            np.testing.assert_allclose(
                means[0][path] / 0.1, wanted, atol=ROUNDING * np.abs(wanted).max()
            )
            assert wanted.any()
        else:
            assert not wanted.any()
            expected = flatten_dict(of_model)[path] * (attention == SPARSE)
            limit = ROUNDING * max(np.abs(g).max() for g in jax.tree.leaves(of_model))
            np.testing.assert_allclose(means[1][path] / 0.1, expected, atol=limit)


def test_an_indexer_stage_moves_nothing_but_indexers(state):
    stage = dataclasses.replace(CONFIG.stages[0], attention=INDEXER, learning_rate=0.5)
    after, metrics = quick_jit(make_train_step(CONFIG, stage))(state, BATCH)
    assert metrics["learning_rate"] == 0.5
    assert 0 < metrics["index_recall"] < 1
    before, moved = (flatten_dict(s.params) for s in (state, after))
    for path, leaf in before.items():
        assert np.array_equal(moved[path], leaf) != ("indexer" in path), path
    assert not any(leaf.any() for leaf in jax.tree.leaves(means_of(after, "model")))


def test_a_step_moves_every_selection_bias_towards_even_load(state, step):
    after, _ = step(state, BATCH)
    _, (*_, features) = quick_jit(objective)(*split_trainable(state.params), MTP_WEIGHT)
    before, after = (flatten_dict(s.params, sep="/") for s in (state, after))
    moved = {path for path in before if path.endswith("selection_bias")}
    assert moved == {f"{p}/moe/selection_bias" for p in ("pairs/csa", "pairs/hca", "mtp/block")}
    for path in moved:
        load = np.asarray(features.layers[path.removesuffix("/moe/selection_bias")].load)
        direction = np.sign(load.mean(axis=-1, keepdims=True) - load)
        assert direction.any()
        np.testing.assert_allclose(
            after[path] - before[path], BIAS_RATE * direction, rtol=ROUNDING
        )


def test_a_skewed_router_evens_out_by_the_bias_update_alone(state, step):
    """One expert of each layer starts far ahead; learning without the update leaves it there."""

    def with_biases(params: dict, biases: dict) -> dict:
        return unflatten_dict({**flatten_dict(params), **biases})

    skewed = {
        path: jnp.zeros_like(leaf).at[..., 0].set(0.3)
        for path, leaf in flatten_dict(state.params).items() if path[-1] == "selection_bias"
    }

    def imbalances(updated: bool) -> list[float]:
        after, found = state._replace(params=with_biases(state.params, skewed)), []
        for _ in range(60):
            after, metrics = step(after, BATCH)
            if not updated:  # as with a rate of 0
                after = after._replace(params=with_biases(after.params, skewed))
            of_layers = [np.max(x) for name, x in metrics.items() if name.startswith(LOAD)]
            assert metrics["max_load"] == np.max(of_layers)
            found.append(np.mean(of_layers))
        return found

    falling, left_alone = imbalances(True), imbalances(False)
    assert min(left_alone) > 1.7  # 2 if all tokens of all layers went there
    assert max(falling[-30:]) < 1.25  # 56 slots of 4 experts: one more is 0.07
