"""The language model heads of released models."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case
from pallas_kernels.cross_entropy import token_nats, token_scores

TOKENS = 8192
VOCABULARY = 129280
WIDTHS = {"Flash": 4096, "Pro": 7168}


def cases() -> Iterator[Case]:
    """Yield the loss with its gradients, and the scores of targets."""
    for model, d in WIDTHS.items():
        hidden = jax.ShapeDtypeStruct((TOKENS, d), jnp.bfloat16)
        head = jax.ShapeDtypeStruct((d, VOCABULARY), jnp.bfloat16)
        targets = jax.ShapeDtypeStruct((TOKENS,), jnp.int32)
        weights = jax.ShapeDtypeStruct((TOKENS,), jnp.float32)
        product, operands = 2 * TOKENS * d * VOCABULARY, 2 * (TOKENS + VOCABULARY) * d
        yield Case(
            "cross_entropy", f"{model}: loss and gradients", _gradients,
            (hidden, head, targets, weights), 3 * product, 2 * operands + 12 * TOKENS,
            special=_targets,
        )
        yield Case(
            "cross_entropy", f"{model}: scores", _scores, (hidden, head, targets), product,
            operands + 9 * TOKENS, special=_targets,
        )


def _targets(rng: np.random.Generator) -> dict[int, np.ndarray]:
    return {2: rng.integers(0, VOCABULARY, TOKENS)}


def _gradients(implementation: str):
    def nats(hidden, head, targets, weights):
        return token_nats(hidden, head, targets, weights, implementation)

    return jax.value_and_grad(nats, argnums=(0, 1, 3))


def _scores(implementation: str):
    return lambda hidden, head, targets: token_scores(hidden, head, targets, implementation)
