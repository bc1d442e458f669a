"""The kernel of the compressor, interpreted, against plain pooling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.attention.compressor import overlap, pool, take_blocks
from dsv4_jax.attention.layout import document_offsets, entry_layout
from dsv4_jax.layers import rms_norm
from pallas_kernels import aot
from pallas_kernels.compressor import claims, gpu, pooled_entries, present
from pallas_kernels.compressor.index import Block

ROUNDING = 1e-5  # of the largest value: float32 sums in another order
EPS = 1e-6

# Ratio, series, width, tokens: of both kinds; a last block that is not full; one block only.
SHAPES = [(4, 2, 16, 23), (8, 1, 16, 40), (128, 1, 64, 300), (4, 2, 32, 4)]

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


def plain(values, gates, bias, norm, layout):
    """Compute entries as the model does."""
    ratio = bias.shape[0]
    values = take_blocks(values, layout, ratio)
    gates = take_blocks(gates, layout, ratio) + bias
    if bias.ndim == 3:
        values, gates = overlap(values, layout, 0.0), overlap(gates, layout, -jnp.inf)
    return rms_norm(pool(values, gates), norm, eps=EPS)


def with_gradients(entries, arguments):
    """Return entries, and the gradients of a weighted sum of those that there are."""
    shape = jax.eval_shape(entries, *arguments).shape
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)

    def total(*arguments):
        return jnp.sum(weights * entries(*arguments))

    return entries(*arguments), *jax.grad(total, argnums=(0, 1, 2, 3))(*arguments)


@pytest.mark.parametrize("implementation", ("xla", "gpu"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_entries_and_gradients_are_those_of_the_model(implementation, shape):
    layout = entry_layout((2, shape[-1]), shape[0], None, None)
    arguments = arrays(shape)
    wanted = with_gradients(lambda *a: plain(*a, layout), arguments)
    found = with_gradients(
        lambda *a: pooled_entries(*a, eps=EPS, implementation=implementation), arguments
    )
    for actual, expected in zip(found, wanted, strict=True):
        assert actual.shape == expected.shape
        assert close(actual, expected)


@pytest.mark.parametrize("implementation", ("xla", "gpu"))
@pytest.mark.parametrize("shape", [(4, 2, 16, 40), (8, 1, 16, 40)], ids=str)
def test_blocks_begin_wherever_documents_do(implementation, shape):
    segments, ratio = jnp.asarray(SEGMENTS), shape[0]
    layout = entry_layout(segments.shape, ratio, segments, document_offsets(segments))
    there = present(layout.start, ratio)
    counts = [sum(n // ratio for n in lengths) for lengths in ((3, 13, 8), (18, 9, 11))]
    assert jnp.sum(there, axis=1).tolist() == counts
    arguments = arrays(shape)

    def entries(*a):
        return pooled_entries(
            *a, layout.start, layout.has_previous, eps=EPS, implementation=implementation
        )

    def masked(function):
        return lambda *a: jnp.where(there[..., None], function(*a), 0)

    found = with_gradients(masked(entries), arguments)
    wanted = with_gradients(masked(lambda *a: plain(*a, layout)), arguments)
    for actual, expected in zip(found, wanted, strict=True):
        assert close(actual, expected)
    unused = jnp.all(found[1] == 0, axis=-1).reshape(2, 40, -1)[..., -1]
    assert jnp.all(unused[segments == 0])  # padding gets no gradient


def test_an_entry_that_is_none_passes_no_gradient_on():
    arguments = arrays((8, 1, 16, 40), rows=1)
    start = jnp.array([[3, 11, 0, 0, 0]], jnp.int32)
    assert present(start, 8).tolist() == [[True, True, False, False, False]]

    def gradients(count):
        def total(*arguments):
            first = start[:, :count]
            return jnp.sum(pooled_entries(*arguments, first, eps=EPS, implementation="gpu") ** 3)

        return jax.grad(total, argnums=(0, 1, 2, 3))(*arguments)

    for two, five in zip(gradients(2), gradients(5), strict=True):
        assert close(five, two)


def test_what_the_kernel_does_not_take_is_refused():
    values, gates, bias, norm = arrays((4, 2, 16, 8))
    with pytest.raises(ValueError, match="expected implementation xla or gpu, got 'tpu'"):
        pooled_entries(values, gates, bias, norm, eps=EPS, implementation="tpu")
    wrong = arrays((6, 1, 16, 12))
    with pytest.raises(ValueError, match=r"powers of two, got \(6, 16\)"):
        pooled_entries(*wrong, eps=EPS, implementation="gpu")


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


# Ratio, series, width: main entries and index keys of CSA, entries of HCA.
RELEASED = {"CSA": (4, 2, 512), "index": (4, 2, 128), "HCA": (128, 1, 512)}


@pytest.mark.aot
@pytest.mark.parametrize("target", aot.GPUS)
@pytest.mark.parametrize("kind", RELEASED)
def test_kernels_compile(target, kind, record_property):
    ratio, series, k = RELEASED[kind]
    t, c = 2**16, 2**16 // ratio
    f32, shape = jnp.float32, jax.ShapeDtypeStruct
    rows = shape((1, t, series, k), f32)
    operands = (
        rows, rows, shape((ratio, series, k), f32), shape((k,), f32), shape((1, c), jnp.int32),
        shape((1, c), jnp.bool_),
    )

    def both(*operands):
        entries = gpu.pooled_entries(*operands, EPS)
        return entries, gpu.gradients(*operands, operands[-1], EPS, entries)

    kernels = aot.compile_for(target, both, *operands).kernels
    assert {kernel.name for kernel in kernels} == {"pooled_entries", "pooled_entries_gradients"}
    for kernel in kernels:
        record_property("aot", f"{kind} | {target} | {kernel}")
        assert kernel.spills == 0
