"""The kernels of the cross-entropy, interpreted, against all logits in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import pallas_kernels.cross_entropy as cross_entropy
from dsv4_jax import loss
from pallas_kernels.cross_entropy import claims, gpu, token_nats, token_scores, tpu
from pallas_kernels.cross_entropy.index import LogitGrid
from pallas_kernels.prove import Proof

pytestmark = pytest.mark.heavy  # a minute of compiling

KERNELS = ("gpu", "tpu")
ROUNDING = 1e-5  # of the largest value: float32 sums in another order
BFLOAT16 = 2**-8  # of the largest value: exponentials and errors are rounded, each to 2^-9
OWN = 2**-9  # of the error of a target: it is made from float32 and rounded once

# Tokens, width, ids: less than a tile, a few tiles, no whole number of any of them.
SHAPES = [(1, 1, 1), (20, 24, 300), (130, 40, 1100), (70, 130, 512)]


def arrays(shape, dtype="float32", head_dtype=None):
    """Return hidden, head, targets and weights, some of which are 0."""
    t, d, v = shape
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((t, d)), dtype)
    head = jnp.asarray(2 * rng.standard_normal((d, v)) / np.sqrt(d), head_dtype or dtype)
    targets = rng.integers(0, v, t)
    targets[[0, -1]] = v - 1, 0  # the ends of the vocabulary are targets, too
    weights = rng.random(t) * (rng.random(t) < 0.7)
    return hidden, head, jnp.asarray(targets, jnp.int32), jnp.asarray(weights, jnp.float32)


def expected(hidden, head, targets, weights):
    """Return nats, gradients of hidden, head and weights, and scores, in float64."""
    h, w, m = (np.asarray(x, np.float64) for x in (hidden, head, weights))
    logits = h @ w
    largest = logits.max(axis=1, keepdims=True)
    log_total = largest[:, 0] + np.log(np.exp(logits - largest).sum(axis=1))
    rows = np.arange(len(h))
    scores = logits[rows, targets] - log_total
    error = np.exp(logits - log_total[:, None])
    error[rows, targets] -= 1
    error *= m[:, None]
    return -np.sum(m * scores), (error @ w.T, h.T @ error, -scores), scores


def close(actual, wanted, tolerance):
    actual = np.asarray(actual, np.float64)
    return np.abs(actual - wanted).max() <= tolerance * max(np.abs(wanted).max(), 1e-3)


def value_and_gradients(arguments, kernel):
    nats = jax.value_and_grad(token_nats, argnums=(0, 1, 3))
    return nats(*arguments, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_compute_nats_and_gradients(kernel, shape):
    arguments = arrays(shape)
    wanted, wanted_gradients, _ = expected(*arguments)
    nats, gradients = value_and_gradients(arguments, kernel)
    assert close(nats, wanted, ROUNDING)
    assert close(token_nats(*arguments, kernel), wanted, ROUNDING)
    for actual, gradient in zip(gradients, wanted_gradients, strict=True):
        assert close(actual, gradient, ROUNDING)


@pytest.mark.parametrize("kernel", ("xla", *KERNELS))
@pytest.mark.parametrize("head_dtype", ("bfloat16", "float32"))
def test_bfloat16_is_summed_in_float32(kernel, head_dtype):
    arguments = arrays((40, 64, 600), "bfloat16", head_dtype)
    hidden, head, *rest = arguments
    exact = expected(hidden, head.astype(hidden.dtype), *rest)
    nats, gradients = value_and_gradients(arguments, kernel)
    assert close(nats, exact[0], ROUNDING)
    assert [g.dtype for g in gradients] == [hidden.dtype, head.dtype, jnp.float32]
    for actual, wanted in zip(gradients, exact[1], strict=True):
        assert close(actual, wanted, BFLOAT16)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_error_of_a_likely_target_does_not_suffer_from_rounding(kernel):
    """1 - p of a target of probability 0.999 is 256 times as exact as a rounded p."""
    t, v = 16, 300
    hidden = jnp.eye(t, dtype=jnp.bfloat16)
    targets = jnp.arange(t, dtype=jnp.int32) * 18
    head = jnp.zeros((t, v), jnp.bfloat16).at[jnp.arange(t), targets].set(12.625)
    arguments = hidden, head, targets, jnp.ones(t, jnp.float32)
    gradient = value_and_gradients(arguments, kernel)[1][1]
    wanted = expected(*arguments)[1][1]
    own = np.arange(t), np.asarray(targets)
    np.testing.assert_allclose(np.asarray(gradient, np.float64)[own], wanted[own], rtol=OWN)


@pytest.mark.parametrize("kernel", ("xla", *KERNELS))
def test_scores_tell_the_likeliest_id_and_the_lowest_of_equals(kernel):
    hidden, head, targets, weights = arrays((40, 24, 1100))
    # Ids 3, 40 and 1050 always have the same logit; in every other row it is the largest.
    hidden = hidden.at[::2, 0].set(100.0)
    head = head.at[:, jnp.array([3, 40, 1050])].set(jnp.eye(24)[0][:, None])
    head = head.at[0].set(head[0] * 0.01).at[0, jnp.array([3, 40, 1050])].set(1.0)
    targets = targets.at[::2].set(jnp.tile(jnp.array([3, 40, 1050, 3]), 5))
    scores, hit = token_scores(hidden, head, targets, kernel)
    assert close(scores, expected(hidden, head, targets, weights)[2], ROUNDING)
    assert hit[::2].tolist() == [True, False, False, True] * 5
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    assert hit[1::2].tolist() == (logits.argmax(axis=1) == np.asarray(targets))[1::2].tolist()


@pytest.mark.parametrize("kernel", KERNELS)
def test_pieces_change_nothing(kernel, monkeypatch):
    arguments = arrays((75, 24, 300))
    whole = value_and_gradients(arguments, kernel), token_scores(*arguments[:3], kernel)
    monkeypatch.setattr(cross_entropy, "PIECE", 32)
    pieces = value_and_gradients(arguments, kernel), token_scores(*arguments[:3], kernel)
    for actual, wanted in zip(jax.tree.leaves(pieces), jax.tree.leaves(whole), strict=True):
        assert actual.shape == wanted.shape
        assert close(actual, np.asarray(wanted, np.float64), ROUNDING)


@pytest.mark.parametrize("kernel", KERNELS)
def test_it_is_the_loss_of_the_model(kernel):
    hidden, head, targets, weights = arrays((48, 32, 700))
    plain = jax.value_and_grad(loss.token_nats, argnums=(0, 1, 3))
    wanted, gradients = plain(
        hidden.reshape(2, 24, 32), head, targets.reshape(2, 24), weights.reshape(2, 24)
    )
    nats, found = value_and_gradients((hidden, head, targets, weights), kernel)
    assert close(nats, float(wanted), ROUNDING)
    for actual, gradient in zip(found, gradients, strict=True):
        assert close(actual, np.asarray(gradient).reshape(actual.shape), ROUNDING)


def sizes(jaxpr):
    """Yield the shape of every array that a program computes, outside kernels."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        if equation.primitive.name != "pallas_call":
            for inner in jaxprs_in_params(equation.params):
                yield from sizes(inner)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_array_has_all_tokens_and_ids(kernel):
    def largest(function):
        hidden, head, targets, weights = (
            jax.ShapeDtypeStruct(x, dtype) for x, dtype in (
                ((8192, 256), jnp.bfloat16), ((256, 129280), jnp.bfloat16),
                ((8192,), jnp.int32), ((8192,), jnp.float32),
            )
        )
        program = jax.make_jaxpr(function)(hidden, head, targets, weights)
        return max((np.prod(x, dtype=np.int64), x) for x in sizes(program.jaxpr))[1]

    assert largest(lambda *a: value_and_gradients(a, kernel)) == (4096, 129280)
    assert largest(lambda *a: token_nats(*a, kernel)) == (8192, 256)
    assert largest(lambda *a: token_scores(*a[:3], kernel)) == (8192, 256)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
def test_tiles_are_whole_and_little_is_filled_up(kernel, dtype):
    module, dtype = {"gpu": gpu, "tpu": tpu}[kernel], jnp.dtype(dtype)
    for t in (1, 16, 17, 100, 512, 1100, 4096, 4097, 12289, 2**20):
        hidden = jax.ShapeDtypeStruct((t, 7168), dtype)
        tile, size, count = cross_entropy._pieces(hidden, module)
        assert size % tile.rows == 0 and size <= cross_entropy.PIECE
        assert t <= size * count < t + (count + 1) * 512
        assert tile == module.tile_for(size, 7168, dtype)


def test_what_a_kernel_does_not_take_is_refused():
    hidden, head, targets, weights = arrays((20, 24, 300))
    with pytest.raises(ValueError, match="expected hidden in bfloat16 or float32, got float16"):
        token_nats(hidden.astype("float16"), head, targets, weights, "gpu")
    for wrong in ((hidden[:, 1:], head, targets), (hidden, head, targets[1:])):
        with pytest.raises(ValueError, match=r"expected hidden \[t, d\], head \[d, v\]"):
            token_scores(*wrong, "tpu")
    with pytest.raises(ValueError, match="got 'triton'"):
        token_nats(hidden, head, targets, weights, "triton")


class LastColumnOff(LogitGrid):
    """Tiles whose mask lets one column too many through."""

    def exists(self, j, c):
        return self.column(j, c) <= self.vocabulary


class LaneOff(LogitGrid):
    """Tiles of which two share a lane."""

    def lanes(self, i, j):
        return i, (j + 1) // 128


def refuted(kind) -> dict[str, tuple[Proof, dict]]:
    return {
        verdict.statement: (proof, verdict.counterexample)
        for proof in claims.proofs(kind) for verdict in proof.verdicts() if not verdict.proved
    }


def test_a_mask_that_is_one_off_is_refuted():
    values = refuted(LastColumnOff)["the mask leaves what is in bounds"][1]
    grid = LastColumnOff(0, values["v"], tpu.TILE)
    assert grid.exists(values["j"], values["c"])
    assert grid.column(values["j"], values["c"]) == values["v"]  # the counterexample is one


def test_lanes_that_are_one_off_are_refuted():
    found = refuted(LaneOff)
    assert "a lane is the tile's own column" in found
    assert "a block of lanes is there" in found
