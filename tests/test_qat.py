"""Low precision in training: the values that checkpoints and caches store, gradients passed on."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compiling import quick_jit
from flax.core import meta
from flax.traverse_util import flatten_dict
from on_mesh import experts_on, mesh_of
from test_cache import ROWS, assert_same, ragged, read_all
from test_hf_parity import CASES, oracle_of
from test_sharding import TOLERANCE, assert_close, moments_of, packed_batch, take_step
from test_sharding import run_config as sharded_config
from test_train_step import BATCH, CONFIG
from tiny_models import sections_of

from dsv4_jax import (
    InputError,
    ModelConfig,
    Runtime,
    Transformer,
    layers,
    load_pretrained,
    moe,
    round_weights,
    save_pretrained,
)
from dsv4_jax.cache import init_cache
from dsv4_jax.cache_format import (
    decode_entry,
    decode_index_key,
    encode_entry,
    encode_index_key,
    round_entry,
    round_index,
)
from dsv4_jax.config import SERVED
from dsv4_jax.convert.storage import Storage, released_storage, target_storage
from dsv4_jax.convert.table import EXPERT, LINEAR, tensors_of
from dsv4_jax.experts import ExpertWeights
from dsv4_jax.model import param_shapes
from dsv4_jax.quant import FP4, FP8, decode, encode
from dsv4_jax.rounding import round_blocks, round_tokens, straight_through
from dsv4_jax.router import Routing
from dsv4_jax.run_config import RunConfig
from dsv4_jax.train_state import init_state
from dsv4_jax.train_step import make_train_step

FLOAT32 = np.dtype(np.float32)
QAT = {"linears": "fp4", "keys": "fp8", "indexer": "fp4"}
MODES = [{"linears": "fp8"}, {"linears": "fp4"}, {"keys": "fp8"}, {"indexer": "fp4"}, QAT]

# Matrices that end within a block of 128 x 128, heads and groups that lie across its edges, and a
# width that groups of 32 do not divide; scanned pairs, experts and the prediction block.
WIDE = ModelConfig(
    vocab_size=16, hidden_size=136, layer_types=("csa", "hca") * 2,
    moe_types=("learned",) * 4, num_attention_heads=6, head_dim=48,
    qk_rope_head_dim=8, q_lora_rank=40, o_groups=3, o_lora_rank=50, sliding_window=4,
    csa_ratio=2, hca_ratio=4, index_n_heads=5, index_head_dim=32, index_topk=2,
    n_routed_experts=3, num_experts_per_tok=2, moe_intermediate_size=140, hc_mult=2,
    hc_sinkhorn_iters=2, max_position_embeddings=64,
)  # fmt: skip


def bits(x) -> np.ndarray:
    """Return float32 numbers as integers, so that zeros of either sign differ."""
    return np.asarray(x, np.float32).view(np.uint32)


def normal(x: np.ndarray) -> np.ndarray:
    """Replace numbers below the smallest normal one by 0, for which XLA on CPU takes them."""
    return np.where(np.abs(x) < 2.0**-126, np.copysign(0, x), x).astype(np.float32)


def matrices(shape: tuple[int, int]):
    """Yield matrices of all magnitudes, with ties, zeros and a block of nothing else."""
    rng = np.random.default_rng(0)
    for exponent in (-126, -110, -20, -3, 0, 5, 100, 126):
        x = rng.uniform(-1, 1, shape).astype(np.float32)
        yield normal(np.ldexp(x, exponent))
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-6, 6, shape)
    x = np.where(rng.random(shape) < 0.3, np.round(x * 8) / 8, x).astype(np.float32)
    x[:130, :128] = 0
    x[:3, :3] = -0.0
    yield x
    # The largest magnitudes at, just below and just above the largest code, times a power of two.
    for form in (FP8, FP4):
        for nudge in (-1, 0, 1):
            largest = np.array(form.largest, np.float32).view(np.int32) + np.int32(nudge)
            yield np.full(shape, largest.view(np.float32) / 64, np.float32)


@pytest.mark.parametrize("form", [FP8, FP4], ids=["fp8", "fp4"])
@pytest.mark.parametrize("shape", [(7, 4), (130, 258), (300, 34)])
def test_rounded_matrices_are_those_of_quant(form, shape):
    rounding = quick_jit(lambda x: round_blocks(x, form, form.block))
    for x in matrices(shape):
        expected = normal(decode(encode(x, form), FLOAT32))
        assert np.array_equal(bits(rounding(x)), bits(expected))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [16, 128, 300])
def test_rounded_tokens_are_those_of_ml_dtypes(dtype, width):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 5, width)) * 10.0 ** rng.uniform(-7, 7, (2, 5, 1))
    x = np.asarray(jnp.asarray(x, dtype).astype(jnp.float32))
    expected = np.empty_like(x)
    for start in range(0, width, 128):
        group = x[..., start : start + 128].astype(np.float64)
        largest = np.maximum(np.abs(group).max(axis=-1, keepdims=True), np.float32(1e-4))
        scale = 2.0 ** np.ceil(np.log2(largest / 448))
        codes = (group / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
        expected[..., start : start + 128] = codes.astype(np.float64) * scale
    actual = quick_jit(round_tokens)(jnp.asarray(x, dtype))
    assert actual.dtype == dtype
    assert np.array_equal(bits(actual), bits(expected))


def test_not_a_number_stays_one():
    """So that a batch which must not count is found out."""
    for bad in (np.nan, np.inf):
        x = jnp.ones((1, 4)).at[0, 1].set(bad)
        assert not np.isfinite(quick_jit(round_tokens)(x)).all()
        assert not np.isfinite(quick_jit(lambda x: round_blocks(x, FP4, FP4.block))(x)).all()


@functools.cache
def wide_params() -> dict:
    rng = np.random.default_rng(2)
    return jax.tree.map(
        lambda w: jnp.asarray(rng.standard_normal(w.shape) * rng.uniform(0.01, 30, w.shape[-1:]),
                              jnp.float32),
        meta.unbox(param_shapes(WIDE)),
    )


@pytest.mark.parametrize("linears", ["fp8", "fp4"])
def test_rounded_weights_are_those_of_a_checkpoint(linears, tmp_path):
    """Every leaf, bit for bit, written to DeepSeek's format by `save_pretrained` and read back."""
    params = wide_params()
    save_pretrained(tmp_path / "saved", WIDE, params, format="deepseek", dtype=linears)
    _, stored = load_pretrained(tmp_path / "saved", dtype="float32")
    rounded = flatten_dict(round_weights(params, WIDE, linears), sep="/")
    before, stored = (flatten_dict(tree, sep="/") for tree in (params, stored))
    quantised = {
        tensor.parts[0].path for tensor in tensors_of(WIDE) if tensor.kind in (EXPERT, LINEAR)
    }
    assert rounded.keys() == before.keys() > quantised
    for path, leaf in rounded.items():
        same_as = stored if path in quantised else before
        assert np.array_equal(leaf, same_as[path]), path
        assert np.array_equal(leaf, before[path]) == (path not in quantised), path


def test_rounding_twice_rounds_no_more_and_keeps_dtypes():
    params = wide_params()
    some = {"head": params["head"], "mtp": params["mtp"]}
    once = round_weights(some, WIDE, "fp4")
    assert jax.tree.all(jax.tree.map(np.array_equal, once, round_weights(once, WIDE, "fp4")))
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), once)
    again = round_weights(narrow, WIDE, "fp4")
    assert again["mtp"]["w_token"].dtype == jnp.bfloat16
    assert jax.tree.all(jax.tree.map(np.array_equal, narrow, again))
    assert round_weights(some, WIDE, "plain") is some


def test_tokens_are_rounded_before_the_matrices_that_checkpoints_quantise(monkeypatch):
    """All of them but the output projection's first, which the reference turns into bfloat16."""
    met = {}

    def spy(kind, function, weights):
        def call(*args, **kwargs):
            # With the weight itself: another one might get the place of one that is gone.
            met.update({id(w): (kind, w) for w in jax.tree.leaves(weights(args))})
            return function(*args, **kwargs)
        return call

    linear = spy("linear", layers.linear, lambda args: args[2])
    for module in ("moe", "mtp", "attention.block", "attention.indexer"):
        monkeypatch.setattr(f"dsv4_jax.{module}.linear", linear)
    experts = spy("experts", moe.routed_experts, lambda args: args[2])
    monkeypatch.setattr(moe, "routed_experts", experts)
    config = dataclasses.replace(WIDE, layer_types=("csa",), moe_types=("learned",))
    found = {}

    def trace(params):
        model, tokens = Transformer(config, Runtime(linears="fp8")), jnp.zeros((1, 8), jnp.int32)
        model.apply({"params": params}, tokens, method="features")
        flat = flatten_dict(params, sep="/").items()
        found.update({path: met[id(leaf)][0] for path, leaf in flat if id(leaf) in met})

    jax.eval_shape(trace, meta.unbox(param_shapes(config)))
    stored = {
        tensor.parts[0].path: "experts" if tensor.kind == EXPERT else "linear"
        for tensor in tensors_of(config) if released_storage(tensor).form is not None
    }
    unrounded = {path for path in stored if path.endswith("w_o_a")}
    assert len(unrounded) == 2
    assert found == {path: kind for path, kind in stored.items() if path not in unrounded}


def test_a_linear_multiplies_rounded_factors_in_both_directions():
    """dx = dy W_q^T and dw = x_q^T dy, against float64 products of the rounded factors."""
    rng = np.random.default_rng(3)
    x, w, dy = (rng.standard_normal(shape).astype(np.float32) for shape in
                ((2, 3, 2, 70), (2, 70, 9), (2, 3, 9)))
    rounded_x = np.asarray(round_tokens(jnp.asarray(x.reshape(2, 3, 140)))).reshape(x.shape)
    assert not np.array_equal(rounded_x, x)
    runtime = Runtime(linears="fp8")
    product = functools.partial(layers.linear, "btgo,god->btd", runtime=runtime)
    y, pull = jax.vjp(product, x, w)
    dx, dw = pull(dy)
    wide_x, wide_w, wide_dy = (a.astype(np.float64) for a in (rounded_x, w, dy))
    for actual, expected in (
        (y, np.einsum("btgo,god->btd", wide_x, wide_w)),
        (dx, np.einsum("btd,god->btgo", wide_dy, wide_w)),
        (dw, np.einsum("btgo,btd->god", wide_x, wide_dy)),
    ):
        # Sums of 140 products in float32, of numbers around 1.
        np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_experts_multiply_rounded_tokens_and_rounded_hidden_layers():
    """One expert, one token: w_down(fp8(silu(g) * u)) of g, u = fp8(x) w."""
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.standard_normal((1, 1, 20)), jnp.float32)
    gate, up, down = (jnp.asarray(rng.standard_normal(shape), jnp.float32)
                      for shape in ((20, 150), (20, 150), (150, 20)))
    routing = Routing(jnp.zeros((1, 1, 1), jnp.int32), jnp.full((1, 1, 1), 0.7))
    weights = ExpertWeights(gate[None], up[None], down[None])

    def expected(x):
        read = round_tokens(x[0])
        hidden = jax.nn.silu(jnp.minimum(read @ gate, 4)) * jnp.clip(read @ up, -4, 4) * 0.7
        return (round_tokens(hidden) @ down)[None]

    for implementation in ("blocks", "ragged"):
        def actual(x, implementation=implementation):
            return experts_on(
                None, x, routing, weights, limit=4.0, moe=implementation, linears="fp8"
            )

        for function in (lambda f: f, lambda f: jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))):
            np.testing.assert_allclose(
                quick_jit(function(actual))(x), quick_jit(function(expected))(x),
                rtol=1e-4, atol=1e-4,  # sums of 150 products in another order
            )


def test_keys_are_those_of_the_served_cache_with_gradients_passed_on():
    rng = np.random.default_rng(5)
    x, dy = (jnp.asarray(rng.standard_normal((3, 48)), jnp.float32) for _ in range(2))
    y, pull = jax.vjp(lambda x: round_entry(x, WIDE), x)
    served = decode_entry(encode_entry(x, WIDE, SERVED), WIDE, SERVED, FLOAT32)
    assert np.array_equal(y, served) and not np.array_equal(y, x)
    assert np.array_equal(pull(dy)[0], dy)

    x, dy = x[:, :32], dy[:, :32]
    y, pull = jax.vjp(lambda x: round_index(x, SERVED), x)
    assert np.array_equal(y, decode_index_key(encode_index_key(x, SERVED), 32, SERVED, FLOAT32))
    sign = np.array([[(-1.0) ** (i & j).bit_count() for j in range(32)] for i in range(32)])
    # The Hadamard matrix stays in the gradient; float32 sums of 32 numbers around 1.
    np.testing.assert_allclose(pull(dy)[0], dy @ sign * 32**-0.5, atol=1e-5)


def test_straight_through_differentiates_as_the_identity():
    y, tangent = jax.jvp(functools.partial(straight_through, jnp.round), (1.7,), (3.0,))
    assert (y, tangent) == (2.0, 3.0)


def with_runtime(config=CONFIG, stage: dict | None = None, **changes):
    runtime = dataclasses.replace(config.runtime, **changes)
    stages = (dataclasses.replace(config.stages[0], **(stage or {})),)
    return dataclasses.replace(config, runtime=runtime, stages=stages)


def test_a_step_takes_the_gradient_at_rounded_weights_and_moves_the_others(tmp_path):
    small = RunConfig.from_config_dict(sections_of(tmp_path))
    config = with_runtime(small, {"accumulation": 2}, linears="fp4")
    tokens = np.random.default_rng(8).integers(0, 300, (2, 32)).astype(np.int32)
    state = init_state(config)._replace(step=jnp.int32(1))
    step = quick_jit(make_train_step(config, config.stages[0]))
    rounded = state._replace(params=round_weights(state.params, config.model, "fp4"))
    (after, metrics), (expected, _) = (step(s, {"tokens": tokens}) for s in (state, rounded))
    found, wanted = (moments_of(s, "mu") for s in (after, expected))
    assert any(leaf.any() for leaf in wanted.values())
    for path, leaf in wanted.items():
        assert np.array_equal(found[path], leaf), path
    path = ("layers_0", "moe", "experts", "w_up")
    before, moved = (flatten_dict(s.params)[path] for s in (state, after))
    rate = float(metrics["learning_rate"])
    # AdamW's first step is the rate at most, weight decay a tenth of that of weights around 1.
    assert 0 < np.abs(moved - before).max() < 1.5 * rate
    assert np.abs(moved - flatten_dict(rounded.params)[path]).max() > 1.5 * rate


@functools.cache
def simulated() -> tuple[ModelConfig, dict]:
    """Return the model of an oracle with rounded weights."""
    config = CASES["unrolled"][0]
    return config, {"params": round_weights(oracle_of("unrolled")[1], config, "fp4")}


def test_a_cache_holds_what_training_has_rounded():
    """In any calls, and whatever format was asked for: as served, by which nothing changes."""
    config, params = simulated()
    model, rng = Transformer(config, Runtime(**QAT)), np.random.default_rng(6)
    tokens = rng.integers(0, config.vocab_size, (ROWS, 60)).astype(np.int32)
    expected = np.asarray(quick_jit(model.apply)(params, tokens))
    caches = [
        init_cache(config, Runtime(cache=form, **QAT), rows=ROWS, max_length=256)
        for form in ("float32", SERVED)
    ]
    assert jax.tree.map(jnp.shape, caches[0]) == jax.tree.map(jnp.shape, caches[1])

    @quick_jit
    def read(tokens, count, state):
        features, state = model.apply(params, tokens, count, state, method="extend")
        return features.logits, state

    actual, _ = read_all(read, tokens, caches[0], ragged(rng, 60, widths=(13,)))
    assert_same(actual, expected)


@pytest.mark.heavy
@pytest.mark.parametrize("mode", [*MODES, QAT | {"dtype": "bfloat16"}], ids=str)
def test_training_in_low_precision_learns(mode):
    """Two rows by heart: 30 steps halve the loss nearly, with layers recomputed and sparse CSA."""
    config = with_runtime(CONFIG, {"attention": "sparse"}, remat=True, **mode)
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-2, decay_fraction=0.0)
    config = dataclasses.replace(config, optimizer=optimizer)
    state, step = init_state(config), quick_jit(make_train_step(config, config.stages[0]))
    losses = []
    for _ in range(30):
        state, metrics = step(state, BATCH)
        losses.append(float(metrics["loss"]))
    assert int(metrics["skipped"]) == 0 and np.isfinite(losses).all()
    assert losses[-1] < 0.6 * losses[0], losses


@pytest.mark.heavy
def test_recomputed_layers_round_alike():
    gradients = []
    for remat in (False, True):
        config = with_runtime(CONFIG, {"attention": "sparse"}, remat=remat, **QAT)
        after, _ = quick_jit(make_train_step(config, config.stages[0]))(init_state(config), BATCH)
        gradients.append(moments_of(after, "mu"))
    assert_close(*gradients)


@pytest.mark.heavy
@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), (1, 2, 4, 1)])
def test_a_rounded_step_on_a_mesh_equals_one_device(sizes):
    config = with_runtime(sharded_config("sparse"), **QAT)
    expected_metrics, expected = take_step(config)
    metrics, state = take_step(config, mesh_of(*sizes))
    for key, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[key], value, rtol=TOLERANCE, err_msg=key)
    assert_close(moments_of(state, "mu"), moments_of(expected, "mu"))
    assert packed_batch()["tokens"].shape[0] % np.prod(sizes) == 0


def expert_call(mesh, width: int):
    rng = np.random.default_rng(7)
    x = jnp.asarray(rng.standard_normal((2, 4, 8)), jnp.float32)
    gate, up, down = (jnp.asarray(rng.standard_normal(shape), jnp.float32)
                      for shape in ((4, 8, width), (4, 8, width), (4, width, 8)))
    routing = Routing(jnp.asarray(rng.integers(0, 4, (2, 4, 2))), jnp.ones((2, 4, 2)))
    return jax.jit(lambda x, weights: experts_on(
        mesh, x, routing, weights, limit=10.0, moe="blocks", linears="fp8"
    ))(x, ExpertWeights(gate, up, down))


def test_experts_are_split_where_groups_end():
    mesh = mesh_of(1, 1, 2, 2)
    # Sums over two devices, of 256 products around 1.
    np.testing.assert_allclose(expert_call(mesh, 256), expert_call(None, 256), rtol=1e-4, atol=1e-3)
    with pytest.raises(InputError, match=r"mesh.tensor: .* multiples of 128.* got 128 / 2 = 64;"):
        expert_call(mesh, 128)


@pytest.mark.parametrize("change, message", [
    ({"linears": "fp16"}, "Runtime.linears: expected one of plain, fp8, fp4, got 'fp16'"),
    ({"keys": "fp4"}, "Runtime.keys: expected one of plain, fp8, got 'fp4'"),
    ({"indexer": True}, "Runtime.indexer: expected str, got True"),
])
def test_unknown_precisions_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        Runtime(**change)


def test_index_keys_that_no_hadamard_matrix_rotates_are_refused():
    with pytest.raises(InputError, match="index_head_dim to be a power of two.*got 12"):
        round_index(jnp.zeros((1, 12)), SERVED)


def test_stored_and_rounded_matrices_are_the_same_ones():
    """The released storage is that of "fp4", that of base models "fp8"."""
    for tensor in tensors_of(WIDE):
        for linears, base in (("fp4", False), ("fp8", True)):
            form = target_storage(tensor, Storage(FLOAT32), linears).form
            assert form is released_storage(tensor, base=base).form
