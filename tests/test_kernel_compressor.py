"""The kernels of the compressor, interpreted, against the model's plain pooling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import quick_jit

from dsv4_jax.attention.compressor import overlap, pool, take_blocks
from dsv4_jax.attention.layout import document_offsets, entry_layout
from dsv4_jax.cache_format import round_entry
from dsv4_jax.config import ModelConfig
from dsv4_jax.layers import rms_norm
from dsv4_jax.rope import Rotation, rotate
from pallas_kernels.compressor import claims, compress, present
from pallas_kernels.compressor.index import Block, Rows
from pallas_kernels.rounding import round_entries

pytestmark = pytest.mark.heavy  # a minute of compiling

ROUNDING = 1e-5  # of the largest value: float32 sums in another order
EPS = 1e-6

BF16 = 2.0**-7  # of the largest value: bfloat16 has 8 bits, and is rounded to twice
KERNELS = ("gpu", "tpu")
ANGLES = 4

# Ratio, series, width, tokens: of both kinds; a last block that is not full; one block only; widths
# that are no powers of two, of several registers too; several steps of a TPU's grid.
SHAPES = [
    (4, 2, 16, 23), (8, 1, 16, 40), (4, 2, 32, 4), (128, 1, 64, 300), (6, 2, 144, 63),
    (4, 2, 16, 1100), (16, 1, 40, 4000),
]

# Documents with no whole block, with trailing tokens, and padding between and after them.
SEGMENTS = np.array([
    [1] * 3 + [2] * 13 + [3] * 8 + [0] * 16,
    [0] * 2 + [1] * 18 + [2] * 9 + [3] * 11,
])


def arrays(shape, rows=2):
    """Return values, gates, bias and norm."""
    ratio, series, k, t = shape
    rng = np.random.default_rng(0)
    tail = (k,) if series == 1 else (series, k)
    made = (
        rng.standard_normal((rows, t, *tail)), 3 * rng.standard_normal((rows, t, *tail)),
        rng.standard_normal((ratio, *tail)), 0.5 + rng.random(k),
    )
    return tuple(jnp.asarray(x, jnp.float32) for x in made)


def close(actual, wanted, tolerance=ROUNDING):
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    return np.abs(actual - wanted).max() <= tolerance * np.abs(wanted).max()


def angles(rows, count):
    angle = np.random.default_rng(2).standard_normal((rows, count, ANGLES))
    return Rotation(*(jnp.asarray(x, jnp.float32) for x in (np.cos(angle), np.sin(angle))))


def plain(values, gates, bias, norm, at, layout, dtype=jnp.float32):
    """Compute entries as the model does."""
    ratio = bias.shape[0]
    values = take_blocks(values, layout, ratio)
    gates = take_blocks(gates, layout, ratio) + bias
    if bias.ndim == 3:
        values, gates = overlap(values, layout, 0.0), overlap(gates, layout, -jnp.inf)
    return rotate(rms_norm(pool(values, gates), norm, eps=EPS).astype(dtype), at)


def with_gradients(entries, arguments):
    """Return entries, and the gradients of a weighted sum of them."""
    shape = jax.eval_shape(entries, *arguments).shape
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)

    def total(*arguments):
        found = entries(*arguments)
        return jnp.sum(weights * found.astype(jnp.float32)), found

    gradients, found = quick_jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))(*arguments)
    return found, *gradients


def check(implementation, shape, dtype, tolerance):
    layout = entry_layout((2, shape[-1]), shape[0], None, None)
    arguments, at = arrays(shape), angles(2, shape[-1] // shape[0])
    wanted = with_gradients(lambda *a: plain(*a, at, layout), arguments)
    found = with_gradients(
        lambda *a: compress(*a, *at, eps=EPS, dtype=dtype, implementation=implementation),
        arguments,
    )
    assert found[0].dtype == dtype
    for actual, expected in zip(found, wanted, strict=True):
        assert actual.shape == expected.shape
        assert close(actual, expected, tolerance)


@pytest.mark.parametrize("implementation", ("xla", *KERNELS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_entries_and_gradients_are_those_of_the_model(implementation, shape):
    check(implementation, shape, jnp.float32, ROUNDING)


@pytest.mark.parametrize("implementation", KERNELS)
def test_entries_are_rounded_to_bfloat16(implementation):
    check(implementation, (4, 2, 16, 23), jnp.bfloat16, BF16)


@pytest.mark.parametrize("implementation", ("xla", *KERNELS))
@pytest.mark.parametrize("shape", [(4, 2, 16, 40), (8, 1, 16, 40)], ids=str)
def test_blocks_begin_wherever_documents_do(implementation, shape):
    segments, ratio = jnp.asarray(SEGMENTS), shape[0]
    layout = entry_layout(segments.shape, ratio, segments, document_offsets(segments))
    there = present(layout.start, ratio)
    counts = [sum(n // ratio for n in lengths) for lengths in ((3, 13, 8), (18, 9, 11))]
    assert jnp.sum(there, axis=1).tolist() == counts
    arguments, at = arrays(shape), angles(*layout.start.shape)

    def entries(*a):
        return compress(
            *a, *at, layout.start, layout.has_previous, eps=EPS, dtype=jnp.float32,
            implementation=implementation,
        )

    def masked(function):
        return lambda *a: jnp.where(there[..., None], function(*a), 0)

    found = with_gradients(masked(entries), arguments)
    wanted = with_gradients(masked(lambda *a: plain(*a, at, layout)), arguments)
    for actual, expected in zip(found, wanted, strict=True):
        assert close(actual, expected)
    unused = jnp.all(found[1] == 0, axis=-1).reshape(2, 40, -1)[..., -1]
    assert jnp.all(unused[segments == 0])  # padding gets no gradient


@pytest.mark.parametrize("implementation", KERNELS)
def test_an_entry_that_is_none_passes_no_gradient_on(implementation):
    arguments = arrays((8, 1, 16, 40), rows=1)
    start = jnp.array([[3, 11, 0, 0, 0]], jnp.int32)
    assert present(start, 8).tolist() == [[True, True, False, False, False]]

    def gradients(count):
        at = angles(1, 5)
        at = Rotation(at.cos[:, :count], at.sin[:, :count])

        def total(*arguments):
            entries = compress(
                *arguments, *at, start[:, :count], eps=EPS, dtype=jnp.float32,
                implementation=implementation,
            )
            return jnp.sum(entries**3)

        return quick_jit(jax.grad(total, argnums=(0, 1, 2, 3)))(*arguments)

    for two, five in zip(gradients(2), gradients(5), strict=True):
        assert close(five, two)


def served(width: int, rotated: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=8, hidden_size=16, layer_types=("window",), moe_types=("hash",),
        num_attention_heads=8, head_dim=width, qk_rope_head_dim=rotated, n_routed_experts=4,
        num_experts_per_tok=2, o_groups=2,
    )


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_rounding_has_the_bits_of_a_served_cache(dtype):
    """At ties, at the borders of scales, below the smallest code and at zeros of both signs."""
    rng, edges = np.random.default_rng(0), [0.0, -0.0, 1e-30, 448.0, 464.0, 1e-4, 2.0**-10]
    mantissas = np.arange(16, 33) / 32  # E4M3's values and the ties between them
    values = np.outer(mantissas, 2.0 ** np.arange(-12, 10)).ravel()
    near = np.concatenate([values, np.nextafter(np.float32(values), 0), edges, -values])
    x = rng.choice(near, (300, 448 + 64)) * 2.0 ** rng.integers(-20, 20, (300, 1))
    x[:40, :64] *= 1e-9
    x[40:44] = 0.0
    x[50:90, 0] = 448 * 2.0 ** np.arange(-20, 20)  # the border between two scales
    x[90:130, 0] = np.nextafter(np.float32(448 * 2.0 ** np.arange(-20, 20)), np.inf)
    x = jnp.asarray(x, dtype)
    wanted = np.asarray(jax.jit(lambda x: round_entry(x, served(512, 64)))(x), np.float32)
    found = np.asarray(jax.jit(lambda x: round_entries(x, 64))(x), np.float32)
    np.testing.assert_array_equal(found.view(np.int32), wanted.view(np.int32))


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("width", (144, 208))  # groups that are full, and one that is not
def test_kernels_round_as_a_served_cache(implementation, width):
    arguments, at = arrays((4, 2, width, 40)), angles(2, 10)

    def entries(rounded):
        return quick_jit(lambda *a: compress(
            *a, *at, eps=EPS, dtype=jnp.float32, rounded=rounded, implementation=implementation
        ))(*arguments)

    wanted = round_entry(entries(False), served(width, 2 * ANGLES))
    np.testing.assert_array_equal(entries(True), wanted)

    def gradient(rounded):
        return quick_jit(jax.grad(lambda v: jnp.sum(jnp.arange(width) * compress(
            v, *arguments[1:], *at, eps=EPS, dtype=jnp.float32, rounded=rounded,
            implementation=implementation,
        ))))(arguments[0])

    np.testing.assert_array_equal(gradient(True), gradient(False))


def test_what_the_kernels_do_not_take_is_refused():
    values, gates, bias, norm = arrays((4, 2, 16, 8))
    at = angles(2, 2)
    with pytest.raises(ValueError, match="expected a dtype of bfloat16 or float32, got float16"):
        compress(
            values, gates, bias, norm, *at, eps=EPS, dtype=jnp.float16, implementation="gpu"
        )
    with pytest.raises(ValueError, match=r"got \[\(2, 8, 2, 16\), \(2, 7, 2, 16\)"):
        compress(values, gates[:, :7], bias, norm, *at, eps=EPS, dtype=jnp.float32)


class OneSlotOff(Block):
    """Blocks whose own tokens begin one slot late."""

    def row(self, start, slot):
        return super().row(start + 1, slot)


def test_a_row_that_is_one_off_is_refuted():
    refuted = {
        verdict.statement: verdict.counterexample
        for proof in claims.proofs(OneSlotOff) for verdict in proof.verdicts()
        if not verdict.proved
    }
    assert "own slots are the block's tokens in order, of the last series" in refuted
    assert "every row is there, used or not" in refuted


class OneStepOff(Rows):
    """Steps that read the tokens at their own beginning as those before."""

    def before(self, block):
        return super().before(block) + 1


def test_tokens_before_that_are_one_off_are_refuted():
    refuted = {
        verdict.statement for proof in claims.proofs(rows=OneStepOff)
        for verdict in proof.verdicts() if not verdict.proved
    }
    assert "they end where a step's tokens begin" in refuted
