"""The kernels of routed experts, interpreted, against a sum over all experts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_jit
from on_mesh import experts_on, mesh_of

from dsv4_jax import quant, rounding
from dsv4_jax.experts import ExpertWeights
from dsv4_jax.router import Routing
from pallas_kernels.moe import Fp4, cases, claims, formats, routed_experts, routed_experts_fp4
from pallas_kernels.moe.index import Grouped
from pallas_kernels.moe.plan import LARGEST, SMALLEST, block_rows, make_plan, make_visits

pytestmark = pytest.mark.heavy  # a minute of compiling

KERNELS = ("gpu", "tpu")
ROUNDING = 1e-5  # of the largest value: float32 sums in another order
BFLOAT16 = 2**-7  # of the largest value: the hidden layer and rows are rounded, then a sum is
LIMIT = 1.5  # about a third of all products are beyond it


def arrays(tokens, choices, width, expert_width, experts, dtype="float32", seed=0):
    """Return tokens, routing weights and the experts' matrices, with products of about 1."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(shape), dtype)

    e, d, f = experts, width, expert_width
    matrices = normal(e, d, f, scale=2 / d**0.5), normal(e, d, f, scale=2 / d**0.5)
    weights = jnp.asarray(rng.uniform(-0.5, 1.5, (tokens, choices)), jnp.float32)
    return normal(tokens, d), weights, *matrices, normal(e, f, d, scale=f**-0.5)


def everywhere(tokens, choices, experts, seed=1):
    rng = np.random.default_rng(seed)
    return rng.integers(0, experts, (tokens, choices))


TOKENS, EACH = 48, 3
ANY = everywhere(TOKENS, EACH, 6) - 1
CHOICES = {
    "any, some of none": ANY,  # -1 and those past the last of 4
    "all to one": np.full((TOKENS, EACH), 2),
    "one expert without": np.where(ANY == 1, 3, ANY),
    "the first and the last without": everywhere(TOKENS, EACH, 2) + 1,
    "none at all": np.full((TOKENS, EACH), 4),
    "whole blocks": np.repeat(np.arange(3), TOKENS).reshape(TOKENS, EACH),
    "one token, twice to one": np.array([[2, 2, 1]]),
    "one choice": everywhere(TOKENS + 1, 1, 4),
}
SHAPE = 40, 24, 4  # width, expert width, experts: no whole tiles


def run(experts, x, weights, gate, up, down, *, implementation, **options):
    return routed_experts(
        x, jnp.asarray(experts, jnp.int32), weights, gate, up, down, limit=LIMIT,
        implementation=implementation, **options,
    )


def value_and_gradients(experts, operands, implementation, compute=run):
    """Return the output, and the gradients of all operands by a weighted sum of it."""
    factor = np.random.default_rng(2).standard_normal(operands[0].shape)
    factor = jnp.asarray(factor, jnp.float32)
    return _compiled(compute, implementation)(jnp.asarray(experts), factor, *operands)


@functools.cache
def _compiled(compute, implementation):
    @quick_jit
    def both(experts, factor, *operands):
        call = functools.partial(compute, experts, implementation=implementation)
        y, pull = jax.vjp(call, *operands)
        return y, *pull(factor)

    return both


def close(actual, wanted, tolerance):
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    return np.abs(actual - wanted).max() <= tolerance * np.abs(wanted).max()


def test_the_reference_is_the_sum_of_each_tokens_experts():
    experts = everywhere(7, 3, 6) - 1
    x, weights, gate, up, down = (np.asarray(a, np.float64) for a in arrays(7, 3, *SHAPE))
    wanted = np.zeros_like(x)
    for token, choice in np.ndindex(experts.shape):
        e = experts[token, choice]
        if not 0 <= e < 4:
            continue
        gated, other = np.minimum(x[token] @ gate[e], LIMIT), x[token] @ up[e]
        hidden = gated / (1 + np.exp(-gated)) * np.clip(other, -LIMIT, LIMIT)
        wanted[token] += weights[token, choice] * hidden @ down[e]
    found = run(experts, *arrays(7, 3, *SHAPE), implementation="xla")
    assert close(found, wanted, ROUNDING)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", CHOICES)
def test_kernels_compute_the_experts_and_their_gradients(kernel, name):
    experts = CHOICES[name]
    operands = arrays(*experts.shape, *SHAPE)
    wanted = value_and_gradients(experts, operands, "xla")
    found = value_and_gradients(experts, operands, kernel)
    for number, (actual, expected) in enumerate(zip(found, wanted, strict=True)):
        assert close(actual, expected, ROUNDING), number
    rowless = np.setdiff1d(np.arange(4), experts)
    for gradient in found[3:]:
        assert not np.asarray(gradient)[rowless].any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_several_tiles_and_steps_in_each_direction(kernel):
    experts = everywhere(70, 2, 3)
    operands = arrays(70, 2, 1100, 600, 3)
    wanted = value_and_gradients(experts, operands, "xla")
    for actual, expected in zip(
        value_and_gradients(experts, operands, kernel), wanted, strict=True
    ):
        assert close(actual, expected, ROUNDING)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_is_summed_in_float32(kernel):
    experts = everywhere(60, 6, 4)
    operands = arrays(60, 6, 256, 128, 4, "bfloat16")
    exact = [a.astype(jnp.float32) for a in operands]
    wanted = value_and_gradients(experts, exact, "xla")
    found = value_and_gradients(experts, operands, kernel)
    for actual, operand, expected in zip(found, (exact[0], *operands), wanted, strict=True):
        assert actual.dtype == operand.dtype
        assert close(actual, expected, BFLOAT16)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_keep_the_dtype_of_the_weights(kernel):
    x, weights, *matrices = arrays(TOKENS, EACH, *SHAPE, "bfloat16")
    matrices = [a.astype(jnp.float32) for a in matrices]
    found = value_and_gradients(ANY, (x, weights, *matrices), kernel)
    wanted = value_and_gradients(ANY, (x.astype(jnp.float32), weights, *matrices), "xla")
    assert found[1].dtype == jnp.bfloat16
    for actual, expected in zip(found[3:], wanted[3:], strict=True):
        assert actual.dtype == jnp.float32
        assert close(actual, expected, BFLOAT16)


def model(experts, x, weights, *matrices, implementation, mesh=None, **options):
    """Compute rows of tokens as the model does."""
    held = jnp.where(experts < 0, matrices[0].shape[0], experts).reshape(ROWS, -1, EACH)
    y = experts_on(
        mesh, x.reshape(ROWS, -1, x.shape[1]), Routing(held, weights.reshape(held.shape)),
        ExpertWeights(*matrices), limit=BESIDE, moe="blocks", kernels=implementation, **options,
    )
    return y.reshape(x.shape)


ROWS = 4
BESIDE = LIMIT + 1 / 32  # no product of multiples of 1 / 4 is at this limit, where it has no slope
ROUNDED = functools.partial(model, linears="fp8")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("compute", (model, ROUNDED), ids=("plain", "rounded"))
def test_the_model_computes_the_same_by_kernels(kernel, compute):
    # Rounding to FP8 would make much of a sum that is grouped differently: sums are exact here.
    operands = [jnp.round(4 * a) / 4 for a in arrays(TOKENS, EACH, *SHAPE)]
    wanted = value_and_gradients(ANY, operands, "xla", compute)
    found = value_and_gradients(ANY, operands, kernel, compute)
    for actual, expected in zip(found, wanted, strict=True):
        assert close(actual, expected, ROUNDING)


@pytest.mark.parametrize("kernel", KERNELS)
def test_devices_that_share_experts_tokens_and_width_run_kernels(kernel):
    mesh = mesh_of(2, 1, 2, 2)
    operands = arrays(TOKENS, EACH, *SHAPE)
    wanted = value_and_gradients(ANY, operands, "xla", model)
    found = value_and_gradients(ANY, operands, kernel, functools.partial(model, mesh=mesh))
    for actual, expected in zip(found, wanted, strict=True):
        assert close(actual, expected, ROUNDING)


@pytest.mark.parametrize("kernel", KERNELS)
def test_few_and_many_tokens_have_the_same_bits_where_that_is_asked_for(kernel):
    x, weights, *matrices = arrays(TOKENS, EACH, *SHAPE)
    call = functools.partial(run, implementation=kernel, invariant=True)
    many, few = call(ANY, x, weights, *matrices), call(ANY[:2], x[:2], weights[:2], *matrices)
    np.testing.assert_array_equal(many[:2], few)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_token_that_is_not_finite_leaves_other_experts_alone(kernel):
    experts = np.ones((TOKENS, EACH), np.int32)
    experts[0] = 0
    x, weights, *matrices = arrays(TOKENS, EACH, *SHAPE)
    found = value_and_gradients(experts, (x.at[0].set(jnp.nan), weights, *matrices), kernel)
    assert np.isnan(found[0][0]).all() and np.isfinite(found[0][1:]).all()
    for gradient in found[3:]:
        assert np.isnan(gradient[0]).any() and np.isfinite(gradient[1:]).all()


@pytest.mark.parametrize("size", (16, 64))
@pytest.mark.parametrize("shape", [(50, 3, 5), (400, 1, 300), (20000, 2, 3)], ids=str)
def test_a_plan_gives_every_choice_a_row_of_its_expert(shape, size):
    tokens, choices, count = shape
    experts = everywhere(tokens, choices, count + 2) - 1
    plan = jax.tree.map(np.asarray, make_plan(jnp.asarray(experts), count, size))
    flat, place = experts.reshape(-1), plan.place.reshape(-1)
    here = (flat >= 0) & (flat < count)
    np.testing.assert_array_equal(plan.source[place[here]], np.nonzero(here)[0])
    assert (place[~here] == plan.source.size).all()
    assert (plan.source < flat.size).sum() == here.sum()
    np.testing.assert_array_equal(plan.owner[place[here] // size], flat[here])
    rows = np.bincount(flat[here], minlength=count)
    np.testing.assert_array_equal(np.diff(plan.first), -(-rows // size))
    visits = jax.tree.map(np.asarray, make_visits(make_plan(experts, count, size), size))
    filled = visits.filled == 1
    np.testing.assert_array_equal(visits.block[filled], np.arange(plan.used[0]))
    np.testing.assert_array_equal(visits.expert[filled], plan.owner[: plan.used[0]])
    np.testing.assert_array_equal(np.unique(visits.expert), np.arange(count))
    assert (np.diff(visits.expert) >= 0).all()


def test_blocks_have_at_most_the_mean_of_rows():
    assert block_rows(64 * 6, 256) == SMALLEST
    assert block_rows(4096 * 6, 256) == 64
    assert block_rows(2**20, 4) == LARGEST


def test_arrays_that_do_not_fit_together_are_refused():
    x, weights, gate, up, down = arrays(5, 2, *SHAPE)
    with pytest.raises(ValueError, match=r"moe: expected x \[t, d\].*\(5, 3\), \(5, 2\)"):
        run(np.zeros((5, 3)), x, weights, gate, up, down, implementation="gpu")
    with pytest.raises(ValueError, match="expected from 1 to 16777215 choices of experts .*got 0"):
        run(np.zeros((0, 2)), x[:0], weights[:0], gate, up, down, implementation="tpu")
    with pytest.raises(ValueError, match="expected implementation to be one of"):
        run(np.zeros((5, 2)), x, weights, gate, up, down, implementation="cuda")


def test_cases_count_the_operations_of_the_fact_sheet():
    found = {case.name: case for case in cases.cases()}
    assert found["Flash: gradient"].flops == 3 * found["Flash: forward"].flops
    assert found["Flash: forward"].flops == pytest.approx(1.237e12, rel=1e-3)


def packed(experts, out, inner, seed):
    """Return any codes at all, and scales around those that keep products near 1."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (experts, out, inner // 2))
    return Fp4(
        jnp.asarray(codes, jnp.uint8),
        jnp.asarray(rng.integers(120, 125, (experts, out, inner // 32)), jnp.uint8),
    )


def packed_experts(width, expert_width):
    return (
        packed(4, expert_width, width, 0), packed(4, expert_width, width, 1),
        packed(4, width, expert_width, 2),
    )


def test_formats_are_those_of_stored_weights_and_fp8_products():
    matrices = packed(1, 5, 96, 3)
    stored = quant.Block(*(np.asarray(part[0]) for part in matrices), quant.FP4)
    np.testing.assert_array_equal(
        formats.decoded(matrices)[0], quant.decode(stored, np.dtype("float32"))
    )
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 160)) * np.exp(4 * rng.standard_normal((40, 1)))
    x = jnp.asarray(np.concatenate([x, 448 * 2.0 ** np.arange(-9, 7)[:, None] * np.ones(160)]))
    x = x.astype(jnp.float32)
    np.testing.assert_array_equal(formats.round_tokens(x), rounding.round_tokens(x))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype, rounded", [("float32", True), ("bfloat16", False)])
def test_kernels_decode_fp4_weights(kernel, dtype, rounded):
    width, expert_width = (96, 64) if rounded else (192, 320)
    experts = jnp.asarray(np.argsort(everywhere(TOKENS, 6, 100), axis=1)[:, :EACH])  # no twice
    x, weights, *_ = arrays(TOKENS, EACH, width, 8, 1, dtype)
    matrices = packed_experts(width, expert_width)

    def run_packed(x, implementation):
        return routed_experts_fp4(
            x, experts, weights, *matrices, limit=LIMIT, rounded=rounded,
            implementation=implementation,
        )

    found = run_packed(x, kernel)
    assert found.dtype == x.dtype
    wanted = run_packed(x.astype(jnp.float32), "xla")
    assert close(found, wanted, BFLOAT16 if dtype == "bfloat16" else ROUNDING)


def test_fp4_weights_that_do_not_fit_are_refused():
    x, weights, *_ = arrays(5, 2, 96, 8, 1)
    call = functools.partial(
        routed_experts_fp4, x, jnp.zeros((5, 2), jnp.int32), weights, limit=LIMIT, rounded=False,
        implementation="gpu",
    )
    gate, up, down = packed_experts(96, 64)
    with pytest.raises(ValueError, match="moe: expected x .* a scale for 32 columns"):
        call(gate._replace(scales=gate.scales[:, :, :2]), up, down)
    large = Fp4(
        jax.ShapeDtypeStruct((2**20, 64, 48), jnp.uint8),
        jax.ShapeDtypeStruct((2**20, 64, 3), jnp.uint8),
    )
    down = Fp4(
        jax.ShapeDtypeStruct((2**20, 96, 32), jnp.uint8),
        jax.ShapeDtypeStruct((2**20, 96, 2), jnp.uint8),
    )
    with pytest.raises(ValueError, match=r"moe: expected fewer than 2\^31 bytes of codes"):
        call(large, large, down)


class OneBlockOff(Grouped):
    """Blocks of which one past the last in use is held."""

    def live(self, block, used):
        return super().live(block, used + 1)


class OneTokenOff(Grouped):
    """Rows of nobody that load past the last token."""

    def token(self, found, tokens):
        return found, found < tokens


@pytest.mark.parametrize(
    "kind, statement",
    [(OneBlockOff, "after these the last stays"), (OneTokenOff, "a load is in bounds")],
)
def test_an_index_that_is_one_off_is_refuted(kind, statement):
    refuted = {
        verdict.statement: verdict
        for proof in claims.proofs(kind) for verdict in proof.verdicts() if not verdict.proved
    }
    found, kernel = refuted[statement].counterexample, kind(SMALLEST)
    if kind is OneBlockOff:
        assert found["block"] >= found["used"] > 0
        assert kernel.live(found["block"], found["used"]) != found["used"] - 1
    else:
        assert kernel.token(found["found"], found["tokens"])[0] == found["tokens"]
