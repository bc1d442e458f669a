"""The symmetric products of released models: those of routed experts, where most weights are."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case
from pallas_kernels.newton_schulz import symmetric_product

EXPERTS = 8  # of one device
SHAPES = {"Flash": (2048, 4096), "Pro": (3072, 7168)}  # expert width, model width


def cases() -> Iterator[Case]:
    """Yield both products of a Newton-Schulz step."""
    for model, (n, m) in SHAPES.items():
        x = jax.ShapeDtypeStruct((EXPERTS, n, m), jnp.bfloat16)
        gram = jax.ShapeDtypeStruct((EXPERTS, n, n), jnp.bfloat16)
        yield Case(
            "newton_schulz", f"{model}: gram", _gram, (x,), EXPERTS * n * (n + 1) * m,
            2 * EXPERTS * (n * m + n * n),
        )
        yield Case(
            "newton_schulz", f"{model}: polynomial", _polynomial, (gram,),
            EXPERTS * n * (n + 1) * n, 2 * EXPERTS * 2 * n * n,
        )


def _gram(implementation: str):
    return lambda x: symmetric_product(x, None, 1.0, 0.0, implementation)


def _polynomial(implementation: str):
    return lambda gram: symmetric_product(gram, gram, 2.0315, -4.775, implementation)
