"""Mixture of experts: scores, tables, balance, and experts against a dense sum over all of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import ModelConfig, Runtime
from dsv4_jax.config import HASH, LEARNED, WINDOW
from dsv4_jax.experts import ExpertWeights, routed_experts
from dsv4_jax.moe import MoE, table_init
from dsv4_jax.router import (
    Routing,
    affinity,
    best_experts,
    expert_load,
    route,
    sequence_balance,
    updated_bias,
)  # fmt: skip

ROUNDING = 1e-6  # a few float32 operations against float64, relative
SUMMED = 2e-5  # of the largest element: float32 products and sums of other order
BFLOAT16 = 0.02  # of the largest element: operands and hidden layer rounded to 8 bits

WIDTH, HIDDEN, EXPERTS, CHOSEN = 6, 10, 5, 3
LIMIT = 1.0  # low enough for the clamps to act
IMPLEMENTATIONS = ("blocks", "ragged")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_affinity_equals_float64():
    logits = np.linspace(-60, 60, 4001)
    expected = np.sqrt(np.logaddexp(0, logits))
    slope = 1 / (1 + np.exp(-logits)) / (2 * expected)
    logits = jnp.asarray(logits, jnp.float32)
    # Near -60 the float32 logit itself is off by 2e-6 and the exponential passes that on.
    np.testing.assert_allclose(affinity(logits), expected, rtol=5 * ROUNDING)
    actual = jax.grad(lambda x: jnp.sum(affinity(x)))(logits)
    np.testing.assert_allclose(actual, slope, rtol=5 * ROUNDING)


def test_affinity_is_finite_far_out():
    logits = jnp.concatenate([jnp.linspace(-1e4, 1e4, 2001), jnp.array([-20.0, 0.0])])
    value, slope = affinity(logits), jax.grad(lambda x: jnp.sum(affinity(x)))(logits)
    assert np.isfinite(value).all() and (value >= 0).all()
    assert np.isfinite(slope).all() and (slope >= 0).all()


def table(layer, vocab, experts, chosen, *, seed: int = 0, key: int = 0) -> np.ndarray:
    """Draw the table of a layer; `key` is that of all weights."""
    draw = jax.jit(table_init(seed, layer, experts), static_argnums=(1, 2))
    return np.asarray(draw(jax.random.key(key), (vocab, chosen), jnp.float32))


@pytest.mark.parametrize("vocab, experts, chosen", [(50, 8, 3), (5, 8, 2), (37, 6, 6)])
def test_table_is_balanced(vocab, experts, chosen):
    rows = table(0, vocab, experts, chosen)
    assert rows.shape == (vocab, chosen) and rows.dtype == np.int32
    assert all(len(set(row)) == chosen for row in rows.tolist())
    # Each full round of `experts` rows goes `chosen` times around one order of the experts; the
    # cut last round stops within one of its turns.
    counts = np.bincount(rows.reshape(-1), minlength=experts)
    assert counts.size == experts and counts.max() - counts.min() <= 1


def test_table_depends_on_seed_and_layer_alone():
    size = (64, 8, 3)
    rows = table(0, *size)
    np.testing.assert_array_equal(rows, table(0, *size, key=1))
    for other in (table(1, *size), table(0, *size, seed=1)):
        assert (rows != other).any(axis=1).mean() > 0.5
    assert len({tuple(sorted(row)) for row in rows.tolist()}) > 10


def test_bias_serves_the_choice_alone():
    scores = jax.nn.sigmoid(normal(0, 2, 7, EXPERTS))
    bias = jnp.zeros(EXPERTS).at[2].set(10.0)

    def weights_of(scores, bias):
        return route(scores, best_experts(scores, bias, CHOSEN), scale=1.5).weights

    experts = np.asarray(best_experts(scores, bias, CHOSEN))
    assert (experts == 2).any(axis=-1).all()
    expected = np.argsort(-(scores + bias), axis=-1)[..., :CHOSEN]
    np.testing.assert_array_equal(np.sort(experts), np.sort(expected))
    by_bias = jax.jacobian(weights_of, argnums=1)(scores, bias)
    np.testing.assert_array_equal(by_bias, 0)


def test_route_weights_by_normalised_scores():
    scores = np.exp(normal(0, 2, 7, EXPERTS))
    experts = np.stack([np.random.default_rng(i).permutation(EXPERTS)[:CHOSEN] for i in range(14)])
    experts = experts.reshape(2, 7, CHOSEN)
    routing = route(scores, experts, scale=1.5)
    chosen = np.take_along_axis(scores, experts, axis=-1)
    expected = 1.5 * chosen / chosen.sum(axis=-1, keepdims=True)
    np.testing.assert_array_equal(routing.experts, experts)
    np.testing.assert_allclose(routing.weights, expected, rtol=ROUNDING)
    without_score = route(jnp.zeros((1, 1, EXPERTS)), experts[:1, :1], scale=1.5)
    np.testing.assert_array_equal(without_score.weights, 0)


def random_experts(seed: int, rows: int, length: int) -> np.ndarray:
    """Distinct experts for each token."""
    draw = np.random.default_rng(seed).random((rows, length, EXPERTS))
    return np.argsort(draw, axis=-1)[..., :CHOSEN].astype(np.int32)


def test_load_counts_valid_slots():
    experts = random_experts(0, 2, 9)
    valid = np.random.default_rng(1).random((2, 9)) < 0.6
    expected = np.bincount(experts[valid].reshape(-1), minlength=EXPERTS)
    np.testing.assert_array_equal(expert_load(experts, EXPERTS, valid), expected)
    np.testing.assert_array_equal(expert_load(experts, EXPERTS, valid & False), 0)


jit_balance = jax.jit(sequence_balance, static_argnums=1)
jit_balance_gradient = jax.jit(jax.grad(sequence_balance), static_argnums=1)


def test_balance_equals_a_loop():
    scores = np.exp(normal(0, 3, 8, EXPERTS))
    valid = np.random.default_rng(1).random((3, 8)) < 0.6
    rows = []
    for row, kept in zip(scores.astype(np.float64), valid, strict=True):
        tokens = row[kept]
        best = np.argsort(-tokens, axis=-1)[:, :CHOSEN]
        frequency = np.bincount(best.reshape(-1), minlength=EXPERTS) * EXPERTS / CHOSEN
        share = (tokens / tokens.sum(axis=-1, keepdims=True)).mean(axis=0)
        rows.append(np.sum(frequency / len(tokens) * share))
    actual = jit_balance(scores, CHOSEN, valid)
    assert actual == pytest.approx(np.mean(rows), rel=ROUNDING)


def test_balance_is_one_if_even_and_more_if_skewed():
    valid = jnp.ones((2, 10), bool)
    even = jnp.full((2, 10, EXPERTS), 0.3)
    skewed = even.at[..., 0].set(2.0)
    assert jit_balance(even, 1, valid) == pytest.approx(1, rel=ROUNDING)
    assert jit_balance(even, CHOSEN, valid) == pytest.approx(1, rel=ROUNDING)
    assert jit_balance(skewed, 1, valid) > 2


def test_balance_ignores_padding():
    scores = np.exp(normal(0, 2, 10, EXPERTS))
    valid = np.arange(10) < np.array([[6], [0]])
    changed = np.where(valid[..., None], scores, np.exp(normal(1, 2, 10, EXPERTS)))
    expected = jit_balance(scores, CHOSEN, valid)
    assert jit_balance(changed, CHOSEN, valid) == expected
    gradient = jit_balance_gradient(scores, CHOSEN, valid)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(np.abs(gradient).max(axis=-1) > 0, valid)


def test_balance_gradient_lowers_the_crowded_expert():
    scores = jnp.full((1, 10, EXPERTS), 0.3).at[..., 0].set(2.0)
    gradient = jit_balance_gradient(scores, 1, jnp.ones((1, 10), bool))
    assert (gradient[..., 0] > 0).all() and (gradient[..., 1:] < 0).all()


def test_bias_moves_towards_even_load():
    bias = jnp.asarray(normal(0, 2, 4))
    load = jnp.array([[0.0, 8.0, 4.0, 4.0], [9.0, 9.0, 9.0, 9.0]])
    moved = np.asarray(updated_bias(bias, load, 0.25) - bias)
    np.testing.assert_allclose(moved, [[0.25, -0.25, 0, 0], [0, 0, 0, 0]], atol=ROUNDING)


def test_bias_update_evens_a_skewed_choice_at_the_published_rate():
    """The scores stay; one expert starts 0.4 ahead, so that 400 steps of 0.001 catch it up."""
    scores, valid = affinity(jnp.asarray(normal(0, 1, 1000, EXPERTS))), jnp.ones((1, 1000), bool)

    def imbalances(rate: float):
        def step(bias, _):
            load = expert_load(best_experts(scores, bias, 1), EXPERTS, valid)
            return updated_bias(bias, load, rate), jnp.max(load) / jnp.mean(load)

        return jax.lax.scan(step, jnp.zeros(EXPERTS).at[0].set(0.4), None, length=501)[1]

    falling, left_alone = (np.asarray(imbalances(rate)) for rate in (1e-3, 0.0))
    assert (left_alone == falling[0]).all() and falling[0] > 2.5
    assert (np.diff(falling[:201:50]) < 0).all()
    assert falling[-100:].max() < 1.05  # of 200 tokens each; a step moves a few of them


def numpy_experts(x, experts, gates, weights: ExpertWeights) -> np.ndarray:
    """Loop over tokens and their experts in float64; ids past the end give nothing."""
    out = np.zeros(x.shape)
    weights = ExpertWeights(*(np.asarray(w, np.float64) for w in weights))
    for b, t, a in np.ndindex(experts.shape):
        e = experts[b, t, a]
        if e < weights.gate.shape[0]:
            gate = np.minimum(x[b, t].astype(np.float64) @ weights.gate[e], LIMIT)
            up = np.clip(x[b, t].astype(np.float64) @ weights.up[e], -LIMIT, LIMIT)
            hidden = gate / (1 + np.exp(-gate)) * up
            out[b, t] += gates[b, t, a] * (hidden @ weights.down[e])
    return out


def dense_experts(x, experts, gates, weights: ExpertWeights, limit: float = LIMIT) -> jax.Array:
    """Run every expert on every token: the same function, made for differentiation."""
    gate = jnp.minimum(jnp.einsum("btd,edf->btef", x, weights.gate), limit)
    up = jnp.clip(jnp.einsum("btd,edf->btef", x, weights.up), -limit, limit)
    out = jnp.einsum("btef,efd->bted", jax.nn.silu(gate) * up, weights.down)
    of_expert = jnp.sum(jax.nn.one_hot(experts, out.shape[2]) * gates[..., None], axis=2)
    return jnp.einsum("bte,bted->btd", of_expert, out)


def random_weights() -> ExpertWeights:
    gate, up = (jnp.asarray(normal(seed, EXPERTS, WIDTH, HIDDEN)) for seed in (1, 2))
    return ExpertWeights(gate, up, jnp.asarray(normal(3, EXPERTS, HIDDEN, WIDTH)))


def sparse_experts(x, experts, gates, weights, *, implementation: str) -> jax.Array:
    return routed_experts(
        x, Routing(experts, gates), weights, limit=LIMIT, runtime=Runtime(moe=implementation)
    )


SPARSE = {name: functools.partial(sparse_experts, implementation=name) for name in IMPLEMENTATIONS}


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, x, experts, gates, weights, cotangent):
    y, pull = jax.vjp(lambda x, g, w: function(x, experts, g, w), x, gates, weights)
    return y, pull(cotangent)


# Ids past the end are absent. 111 tokens, 333 slots: no whole number of blocks of rows.
MANY = (3, 37)
ROUTINGS = {
    "one token": random_experts(0, 1, 1),
    "random": random_experts(1, *MANY),
    "one expert for all": np.broadcast_to(np.array([3, EXPERTS, EXPERTS]), (*MANY, CHOSEN)),
    "experts without tokens": np.broadcast_to(np.array([4, 1, 2]), (*MANY, CHOSEN)),
    "some absent": np.where(random_experts(2, *MANY) < 3, random_experts(2, *MANY), EXPERTS),
    "all absent": np.full((*MANY, CHOSEN), EXPERTS),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ROUTINGS)
def test_experts_equal_the_dense_sum(case, implementation):
    experts, weights = jnp.asarray(ROUTINGS[case], jnp.int32), random_weights()
    x, gates = normal(4, *experts.shape[:2], WIDTH), normal(5, *experts.shape)
    args = x, experts, gates, weights, normal(6, *x.shape)
    y, gradients = value_and_gradients(SPARSE[implementation], *args)
    assert_close(y, numpy_experts(x, experts, gates, weights))
    jax.tree.map(assert_close, (y, gradients), value_and_gradients(dense_experts, *args))


def assert_close(actual, expected, tolerance: float = SUMMED) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_in_bfloat16(implementation):
    experts, weights = jnp.asarray(ROUTINGS["some absent"], jnp.int32), random_weights()
    x, gates = normal(4, *experts.shape[:2], WIDTH), normal(5, *experts.shape)
    y = jax.jit(SPARSE[implementation])(jnp.asarray(x, jnp.bfloat16), experts, gates, weights)
    assert y.dtype == jnp.bfloat16
    assert_close(np.asarray(y, np.float32), numpy_experts(x, experts, gates, weights), BFLOAT16)


@pytest.mark.parametrize("kind", [HASH, LEARNED])
def test_layer_adds_the_shared_expert_and_scales_routed_ones(kind):
    config = ModelConfig(
        vocab_size=16, hidden_size=WIDTH, layer_types=(WINDOW,), moe_types=(kind,),
        num_attention_heads=8, n_routed_experts=EXPERTS, num_experts_per_tok=CHOSEN,
        moe_intermediate_size=HIDDEN, routed_scaling_factor=2.5, swiglu_limit=LIMIT,
    )  # fmt: skip
    shared = {name: normal(i, WIDTH, HIDDEN) for i, name in enumerate(("w_gate", "w_up"))}
    shared["w_down"] = normal(9, HIDDEN, WIDTH)
    routed = dict(zip(("w_gate", "w_up", "w_down"), random_weights(), strict=True))
    router = normal(10, WIDTH, EXPERTS)
    params = {"w_router": router, "experts": routed, "shared": shared}
    tokens = np.random.default_rng(0).integers(0, 16, (2, 11))
    x, valid = normal(11, 2, 11, WIDTH), np.ones((2, 11), bool)
    scores = np.sqrt(np.logaddexp(0, x.astype(np.float64) @ router))
    if kind == HASH:
        params["hash_table"] = table(0, 16, EXPERTS, CHOSEN)
        experts = params["hash_table"][tokens]
    else:
        params["selection_bias"] = normal(12, EXPERTS)
        experts = np.argsort(-(scores + params["selection_bias"]))[..., :CHOSEN]
    gates = np.take_along_axis(scores, experts, axis=-1)
    gates = 2.5 * gates / gates.sum(axis=-1, keepdims=True)
    of_all = ExpertWeights(*(shared[name][None] for name in ("w_gate", "w_up", "w_down")))
    everywhere = np.zeros((2, 11, 1), int)
    expected = numpy_experts(x, experts, gates, ExpertWeights(*routed.values()))
    expected += numpy_experts(x, everywhere, np.ones(everywhere.shape), of_all)

    moe = MoE(config, Runtime(), kind, 0)
    y, _, load, balance_loss = jax.jit(moe.apply)({"params": params}, x, tokens, valid)
    assert_close(y, expected)
    np.testing.assert_array_equal(load, np.bincount(experts.reshape(-1), minlength=EXPERTS))
    balance = 0.0 if kind == HASH else float(jit_balance(scores, CHOSEN, valid))
    assert balance_loss == pytest.approx(balance, rel=10 * ROUNDING)
