"""Manifold-constrained hyper-connections: Sinkhorn, the gates, reading and writing streams."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dsv4_jax import ModelConfig, Runtime
from dsv4_jax.config import LEARNED, WINDOW
from dsv4_jax.mhc import StreamMix, collapse, expand, sinkhorn, sinkhorn_error

STREAMS, WIDTH, BATCH, LENGTH = 4, 8, 2, 3
ITERATIONS, EPS = 20, 1e-6
ROUNDING = 1e-5  # float32 against float64 through 20 normalisations, relative
COLUMN_SUM = 1e-5  # the last step divides by the sum and eps: 1e-6 short, and rounding
ROW_SUM = 0.1  # 20 rounds at logits of deviation 2 leave at most a few hundredths
BFLOAT16_ROUNDING = 2**-8  # one cast, relative

CONFIG = ModelConfig(
    vocab_size=4, hidden_size=WIDTH, layer_types=(WINDOW,), moe_types=(LEARNED,),
    num_attention_heads=8, hc_mult=STREAMS, hc_sinkhorn_iters=ITERATIONS, hc_eps=EPS,
)  # fmt: skip


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def positive_matrices(deviation: float) -> np.ndarray:
    logits = deviation * normal(0, STREAMS, STREAMS, BATCH, 50)
    return np.asarray(jax.nn.softmax(logits, axis=1)) + EPS


def numpy_sinkhorn(matrix: np.ndarray, iterations: int, eps: float) -> np.ndarray:
    """Normalise one [n, m] matrix, as fact sheet 2.2 writes it."""
    matrix = matrix.astype(np.float64)
    for iteration in range(iterations):
        if iteration > 0:
            matrix = matrix / (matrix.sum(axis=1, keepdims=True) + eps)
        matrix = matrix / (matrix.sum(axis=0, keepdims=True) + eps)
    return matrix


@pytest.mark.parametrize("iterations, eps", [(1, 1e-6), (2, 0.1), (20, 1e-6), (20, 0.05)])
def test_sinkhorn_equals_a_loop(iterations, eps):
    matrices = positive_matrices(2.0)
    actual = sinkhorn(matrices, iterations, eps)
    for place in np.ndindex(matrices.shape[2:]):
        expected = numpy_sinkhorn(matrices[:, :, *place], iterations, eps)
        np.testing.assert_allclose(actual[:, :, *place], expected, rtol=ROUNDING)


def test_sinkhorn_sums():
    result = np.asarray(sinkhorn(positive_matrices(2.0), ITERATIONS, EPS))
    assert (result >= 0).all()
    assert np.abs(result.sum(axis=0) - 1).max() <= COLUMN_SUM
    assert np.abs(result.sum(axis=1) - 1).max() <= ROW_SUM


def test_sinkhorn_error_is_the_largest_of_rows_and_columns():
    doubly_stochastic = np.full((STREAMS, STREAMS, BATCH, LENGTH), 1 / STREAMS, np.float32)
    assert sinkhorn_error(doubly_stochastic) == 0
    for first, second in (((0, 1), (0, 2)), ((1, 0), (2, 0))):  # in one row, in one column
        moved = doubly_stochastic.copy()
        moved[*first, 1, 2] += 0.125
        moved[*second, 1, 2] -= 0.125  # the sum of both stays
        assert sinkhorn_error(moved) == 0.125
    matrices = np.asarray(sinkhorn(positive_matrices(2.0), 2, EPS), np.float64)
    expected = max(np.abs(matrices.sum(axis=axis) - 1).max() for axis in (0, 1))
    assert sinkhorn_error(jnp.float32(matrices)) == pytest.approx(expected, rel=ROUNDING)
    gradient = jax.grad(sinkhorn_error)(moved)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("deviation", [0.0, 2.0, 50.0])
def test_sinkhorn_gradient_is_finite(deviation):
    """Even where softmax leaves single ones and the rest at eps."""
    weights = normal(1, STREAMS, STREAMS, BATCH, 50)

    def weighted_sum(matrices):
        return jnp.vdot(weights, sinkhorn(matrices, ITERATIONS, EPS))

    assert np.isfinite(jax.grad(weighted_sum)(positive_matrices(deviation))).all()


def test_sinkhorn_gradient_equals_finite_differences():
    matrix = positive_matrices(1.0)[..., 0, 0]
    weights, direction = normal(1, STREAMS, STREAMS), normal(2, STREAMS, STREAMS)

    def weighted_sum(matrix):
        return jnp.vdot(weights, sinkhorn(matrix[..., None, None], 5, EPS)[..., 0, 0])

    def numpy_weighted_sum(matrix):
        return np.vdot(weights.astype(np.float64), numpy_sinkhorn(matrix, 5, EPS))

    step = 1e-5 * direction.astype(np.float64)
    expected = (numpy_weighted_sum(matrix + step) - numpy_weighted_sum(matrix - step)) / 2e-5
    actual = np.vdot(jax.grad(weighted_sum)(matrix), direction)
    assert actual == pytest.approx(expected, rel=1e-4)  # cancellation in the difference


@pytest.mark.parametrize("common", [0.0, 100.0])
@pytest.mark.parametrize("eps", [EPS, 0.05])
def test_sinkhorn_gradient_equals_plain_differentiation_in_float64(eps, common):
    """Also where a large part common to the whole gradient cancels."""
    logits = 2 * normal(0, STREAMS, STREAMS, BATCH, 50)
    weights = common + normal(1, STREAMS, STREAMS, BATCH, 50)

    def weighted_sum(logits, normalise):
        positive = jax.nn.softmax(logits, axis=1) + eps
        return jnp.vdot(weights, normalise(positive))

    def plain(matrix):
        for iteration in range(ITERATIONS):
            if iteration > 0:
                matrix = matrix / (matrix.sum(axis=1, keepdims=True) + eps)
            matrix = matrix / (matrix.sum(axis=0, keepdims=True) + eps)
        return matrix

    ours = np.asarray(jax.grad(weighted_sum)(logits, lambda x: sinkhorn(x, ITERATIONS, eps)))
    with jax.enable_x64(True):
        expected = np.asarray(jax.grad(weighted_sum)(logits.astype(np.float64), plain))
    assert np.linalg.norm(ours - expected) <= ROUNDING * np.linalg.norm(expected)


def test_collapse_and_expand_equal_loops():
    streams = normal(0, BATCH, LENGTH, STREAMS, WIDTH)
    y = normal(1, BATCH, LENGTH, WIDTH)
    pre, post = normal(2, STREAMS, BATCH, LENGTH), normal(3, STREAMS, BATCH, LENGTH)
    comb = normal(4, STREAMS, STREAMS, BATCH, LENGTH)  # not symmetric: the direction shows
    read, written = np.zeros(y.shape), np.zeros(streams.shape)
    for b, t in np.ndindex(BATCH, LENGTH):
        read[b, t] = sum(pre[n, b, t] * streams[b, t, n] for n in range(STREAMS))
        for m in range(STREAMS):
            mixed = sum(comb[n, m, b, t] * streams[b, t, n] for n in range(STREAMS))
            written[b, t, m] = post[m, b, t] * y[b, t] + mixed
    np.testing.assert_allclose(collapse(streams, pre), read, rtol=ROUNDING, atol=ROUNDING)
    actual = expand(streams, y, post, comb)
    np.testing.assert_allclose(actual, written, rtol=ROUNDING, atol=ROUNDING)


def test_streams_keep_their_dtype_and_are_mixed_in_float32():
    streams = jnp.asarray(normal(0, BATCH, LENGTH, STREAMS, WIDTH), jnp.bfloat16)
    y = jnp.asarray(normal(1, BATCH, LENGTH, WIDTH), jnp.bfloat16)
    pre, post = normal(2, STREAMS, BATCH, LENGTH), normal(3, STREAMS, BATCH, LENGTH)
    comb = normal(4, STREAMS, STREAMS, BATCH, LENGTH)
    exact_streams, exact_y = streams.astype(jnp.float32), y.astype(jnp.float32)
    pairs = (
        (collapse(streams, pre), collapse(exact_streams, pre)),
        (expand(streams, y, post, comb), expand(exact_streams, exact_y, post, comb)),
    )
    for rounded, exact in pairs:
        assert rounded.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            rounded.astype(jnp.float32), exact, rtol=BFLOAT16_ROUNDING, atol=ROUNDING
        )


def fresh_gates(own_stream: int, streams) -> tuple[jax.Array, jax.Array, jax.Array]:
    mix = StreamMix(CONFIG, Runtime(), own_stream)
    return mix.init_with_output(jax.random.key(own_stream), streams, method="gates")[0]


def numpy_gates(params: dict, streams: np.ndarray) -> tuple[np.ndarray, ...]:
    """The gates of one token [n, d] in float64, as fact sheet 2.2 writes them."""
    flat = streams.T.reshape(-1).astype(np.float64)
    flat = flat / np.sqrt(np.mean(flat * flat) + CONFIG.rms_norm_eps)
    project = {
        name: np.tensordot(flat, np.asarray(fn, np.float64).reshape(flat.size, *fn.shape[2:]), 1)
        for name, fn in params.items()
        if name.startswith("fn_")
    }
    scale = np.asarray(params["scale"], np.float64)
    pre = project["fn_pre"] * scale[0] + params["base_pre"]
    post = project["fn_post"] * scale[1] + params["base_post"]
    comb = np.exp(project["fn_comb"] * scale[2] + params["base_comb"])
    comb = comb / comb.sum(axis=1, keepdims=True) + EPS
    comb = numpy_sinkhorn(comb, ITERATIONS, EPS)
    return 1 / (1 + np.exp(-pre)) + EPS, 2 / (1 + np.exp(-post)), comb


def test_gates_equal_a_loop_over_tokens():
    streams = 5 * normal(0, BATCH, LENGTH, STREAMS, WIDTH)
    mix = StreamMix(CONFIG, Runtime(), own_stream=0)
    init = functools.partial(mix.init, method="gates")
    shapes = nn.meta.unbox(jax.eval_shape(init, jax.random.key(0), streams))["params"]
    params = {name: normal(i, *shape.shape) for i, (name, shape) in enumerate(shapes.items())}
    gates = mix.apply({"params": params}, streams, method="gates")
    for place in np.ndindex(BATCH, LENGTH):
        for actual, expected in zip(gates, numpy_gates(params, streams[place]), strict=True):
            np.testing.assert_allclose(
                actual[..., *place], expected, rtol=10 * ROUNDING, atol=ROUNDING
            )


def test_fresh_comb_is_near_the_identity():
    """Streams keep most of what was written to them."""
    _, _, comb = fresh_gates(1, normal(0, BATCH, LENGTH, STREAMS, WIDTH))
    diagonal = np.einsum("nnbt->nbt", comb)
    assert (diagonal > 0.8).all() and (diagonal < 1).all()


@pytest.mark.parametrize("own_stream", range(2 * STREAMS))
def test_fresh_gates_favour_the_own_stream(own_stream):
    pre, post, _ = fresh_gates(own_stream, normal(0, BATCH, LENGTH, STREAMS, WIDTH))
    for gate in (pre, post):
        np.testing.assert_array_equal(np.argmax(gate, axis=0), own_stream % STREAMS)


def test_fresh_gates_make_equal_streams_differ():
    """All streams start as the same embedding; sublayers must not keep them equal."""
    x = normal(0, BATCH, LENGTH, 1, WIDTH)
    streams = jnp.broadcast_to(x, (BATCH, LENGTH, STREAMS, WIDTH))
    for sublayer in range(STREAMS):
        pre, post, comb = fresh_gates(sublayer, streams)
        y = np.tanh(collapse(streams, pre)) + normal(sublayer, BATCH, LENGTH, WIDTH)
        streams = expand(streams, y, post, comb)
    size = np.linalg.norm(streams[:, :, 0])
    for n, m in itertools.combinations(range(STREAMS), 2):
        assert np.linalg.norm(streams[:, :, n] - streams[:, :, m]) > 0.1 * size


def test_fresh_gates_follow_an_ordinary_residual_network():
    """The mean over streams moves by about y times the mean of post; comb only moves mass."""
    streams = normal(0, BATCH, LENGTH, STREAMS, WIDTH)
    y = normal(1, BATCH, LENGTH, WIDTH)
    _, post, comb = fresh_gates(0, streams)
    moved = expand(streams, y, post, comb).mean(axis=2) - streams.mean(axis=2)
    expected = np.asarray(post).mean(axis=0)[..., None] * y
    assert np.linalg.norm(moved - expected) <= ROW_SUM * np.linalg.norm(streams.mean(axis=2))
