"""Every kernel compiles for accelerators that are not here, at the shapes of released models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("case", tuple(aot.all_cases()), ids=lambda c: f"{c.operation}: {c.name}")
def test_kernels_compile(case, target, record_property):
    rows = list(aot.rows(case, target))
    assert rows
    for row in rows:
        record_property("aot", row)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_a_kernel_that_does_not_fit_is_refused(target, monkeypatch):
    """The compilers are real: what is too large for a device does not compile."""
    from pallas_kernels.newton_schulz import gpu, symmetric_product, tpu

    monkeypatch.setattr(tpu, "TILES", tpu.Tiles(128, 2**16))
    monkeypatch.setitem(gpu.TILES, "bfloat16", gpu.Tiles(128, 256, 8, 4))
    x = jax.ShapeDtypeStruct((1, 512, 2**16), jnp.bfloat16)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        aot.compile_for(target, lambda x: symmetric_product(x), x)
