"""The kernels of Newton-Schulz iterations, interpreted, against the plain product."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from dsv4_jax.newton_schulz import orthogonalize
from pallas_kernels.newton_schulz import claims, symmetric_product, tpu
from pallas_kernels.newton_schulz.index import Triangle

KERNELS = ("gpu", "tpu")
ROUNDING = 1e-5  # of the largest value: float32 sums in another order
BFLOAT16 = 2**-8  # of the largest value: a result rounded once, on either side of a border

# One tile, an odd and an even number of them; sides that are no whole number of tiles.
SHAPES = [(1, 128, 128), (2, 384, 256), (1, 512, 64), (3, 130, 300), (1, 1, 1), (2, 40, 1100)]


def stacks(shape, dtype="float32"):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape) / np.sqrt(shape[-1])
    add = rng.standard_normal((shape[0], shape[1], shape[1]))
    return jnp.asarray(x, dtype), jnp.asarray(add + add.swapaxes(1, 2), dtype)


def expected(x, add, scale=0.5, add_scale=-2.0):
    x, add = np.asarray(x, np.float64), np.asarray(add, np.float64)
    return scale * x @ x.swapaxes(1, 2) + add_scale * add


def close(actual, wanted, tolerance):
    actual = np.asarray(actual, np.float64)
    return np.abs(actual - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_compute_the_symmetric_product(kernel, shape):
    x, add = stacks(shape)
    product = symmetric_product(x, None, 1.0, 0.0, kernel)
    assert close(product, expected(x, add, 1.0, 0.0), ROUNDING)
    np.testing.assert_array_equal(product, product.mT)
    assert close(symmetric_product(x, add, 0.5, -2.0, kernel), expected(x, add), ROUNDING)


@pytest.mark.parametrize("kernel", ("xla", *KERNELS))
def test_factors_in_bfloat16_are_summed_in_float32(kernel):
    x, add = stacks((2, 256, 640), "bfloat16")
    product = symmetric_product(x, add, 0.5, -2.0, kernel)
    assert product.dtype == jnp.bfloat16
    assert close(product, expected(x, add), BFLOAT16)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_gradient_is_that_of_the_plain_product(kernel):
    x, add = stacks((2, 40, 24))
    weight = jnp.asarray(np.random.default_rng(1).standard_normal(add.shape), jnp.float32)

    def loss(x, add, implementation):
        return jnp.sum(weight * symmetric_product(x, add, 0.5, -2.0, implementation))

    def plain(x, add):
        return jnp.sum(weight * (0.5 * jnp.einsum("znm,zkm->znk", x, x) - 2.0 * add))

    for actual, wanted in zip(
        jax.grad(loss, argnums=(0, 1))(x, add, kernel), jax.grad(plain, argnums=(0, 1))(x, add),
        strict=True,
    ):
        assert close(actual, np.asarray(wanted), ROUNDING)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(2, 24, 60), (1, 60, 24)], ids=str)
def test_matrices_are_orthogonalized_alike_with_kernels(kernel, shape):
    x, _ = stacks(shape)
    plain = np.asarray(orthogonalize(x, dtype="float32", implementation="xla"))
    assert close(orthogonalize(x, dtype="float32", implementation=kernel), plain, ROUNDING)


def run_detecting_races(x, copies):
    """Run the TPU's kernel on simulated memory and say whether two accesses were not ordered.

    Args:
      copies: "eager" ones are done when they start, others when they are waited for ("on_wait").
    """
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode=copies)
    out = tpu.symmetric_product(x, None, scale=1.0, add_scale=0.0, interpret=params)
    return jax.block_until_ready(out), interpret_pallas_call.races.races_found


@pytest.mark.parametrize("copies", ("eager", "on_wait"))
def test_the_copies_of_the_tpu_kernel_do_not_race(copies):
    x, add = stacks((2, 384, 128))
    product, races = run_detecting_races(x, copies)
    assert close(product, expected(x, add, 1.0, 0.0), ROUNDING)
    assert not races


def test_a_copy_that_is_not_waited_for_is_found(monkeypatch, capfd):
    class Unwaited:
        def __init__(self, *args):
            self._copy = pltpu.make_async_copy(*args)

        def start(self):
            self._copy.start()

        def wait(self):
            pass

    class Broken:
        def __getattr__(self, name):
            return Unwaited if name == "make_async_copy" else getattr(pltpu, name)

    monkeypatch.setattr(tpu, "pltpu", Broken())
    try:
        _, races = run_detecting_races(stacks((2, 384, 128))[0], "eager")
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    assert races
    assert "RACE DETECTED" in capfd.readouterr().out


class OneRowOff(Triangle):
    """A triangle whose folded part begins a row too low."""

    def tile(self, row, column):
        i, j = super().tile(row, column)
        return i + 1, j


def test_a_tile_that_is_one_off_is_refuted():
    (proof,) = claims.proofs(OneRowOff)
    refuted = [verdict for verdict in proof.verdicts() if not verdict.proved]
    assert "a tile lies in the triangle" in [verdict.statement for verdict in refuted]
    values = refuted[0].counterexample
    triangle = OneRowOff(values["tiles"])
    i, j = triangle.tile(values["row"], values["column"])
    assert not 0 <= j <= i < triangle.tiles  # the counterexample is one
