"""The routed experts of released models that one device holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case
from pallas_kernels.moe import Fp4, routed_experts, routed_experts_fp4

LIMIT = 10.0
GRADIENT = "gradient"
CHOICES = 6


class Shape(NamedTuple):
    """What a device holds of a model."""

    experts: int
    width: int
    expert_width: int


SHAPES = {"Flash": Shape(32, 4096, 2048), "Pro": Shape(24, 7168, 3072)}  # of 8 and 16 devices
TRAINING, DECODING = 4096, 64  # tokens whose every choice is an expert held here


def cases() -> Iterator[Case]:
    """Yield the forward pass and its gradient for training, and the forward pass for decoding."""
    for model, shape in SHAPES.items():
        for name, run, tokens, products in (
            ("forward", _forward, TRAINING, 3), (GRADIENT, _gradient, TRAINING, 9),
            ("decoding", _forward, DECODING, 3),
        ):
            yield _case(model, shape, name, run, tokens, products)
        yield _packed_case(model, shape)


def _case(model: str, shape: Shape, name: str, run, tokens: int, products: int) -> Case:
    """Make a case of `products` products of every choice's row with a matrix of its expert."""
    e, d, f = shape
    x, gate, down = (
        jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((tokens, d), (e, d, f), (e, f, d))
    )
    experts = jax.ShapeDtypeStruct((tokens, CHOICES), jnp.int32)
    weights = jax.ShapeDtypeStruct((tokens, CHOICES), jnp.float32)
    moved = 2 * (3 * e * d * f + 2 * tokens * d)
    return Case(
        "moe", f"{model}: {name}", run, (x, experts, weights, gate, gate, down),
        products * 2 * tokens * CHOICES * d * f, moved * (1 if products == 3 else 3),
        covered=name == "forward", special=lambda rng: {1: rng.integers(0, e, (tokens, CHOICES))},
    )


def _packed_case(model: str, shape: Shape) -> Case:
    e, d, f = shape

    def matrices(out: int, inner: int) -> Fp4:
        sizes = (e, out, inner // 2), (e, out, inner // 32)
        return Fp4(*(jax.ShapeDtypeStruct(size, jnp.uint8) for size in sizes))

    plain = _case(model, shape, "decoding, FP4", _forward_packed, DECODING, 3)
    weights = matrices(f, d), matrices(f, d), matrices(d, f)
    moved = sum(x.size for x in jax.tree.leaves(weights)) + 2 * 2 * DECODING * d

    def special(rng: np.random.Generator) -> dict[int, np.ndarray]:
        """Make codes, and scales of about 1 / 32."""
        made = plain.special(rng)
        for i, x in enumerate(jax.tree.leaves(weights)):
            made[3 + i] = rng.integers(*((0, 256) if i % 2 == 0 else (119, 125)), x.shape, np.uint8)
        return made

    return plain._replace(
        arguments=(*plain.arguments[:3], *weights), bytes=moved, special=special
    )


def _forward_packed(implementation: str):
    return lambda *arrays: routed_experts_fp4(
        *arrays, limit=LIMIT, rounded=True, implementation=implementation
    )


def _forward(implementation: str):
    return lambda *arrays: routed_experts(*arrays, limit=LIMIT, implementation=implementation)


def _gradient(implementation: str):
    return gradient_of(_forward(implementation))


def gradient_of(forward: Callable) -> Callable:
    """Return what computes the sum of all outputs and its gradients."""

    def gradient(x, experts, *others):
        def loss(x, *others):
            return jnp.sum(forward(x, experts, *others).astype(jnp.float32))

        return jax.value_and_grad(loss, argnums=tuple(range(5)))(x, *others)

    return gradient
