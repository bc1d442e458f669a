"""Compressors of released models, of which Flash and Pro have the same, at 16,384 tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case
from pallas_kernels.compressor import compress

TOKENS = 2**14
ANGLES = 32


class Shape(NamedTuple):
    """A compressor."""

    ratio: int
    series: int
    width: int
    rounded: bool


KINDS = {
    "CSA, entries": Shape(4, 2, 512, True), "CSA, index keys": Shape(4, 2, 128, False),
    "HCA, entries": Shape(128, 1, 512, True),
}
# Of each value: sum and maximum, exponential, two sums; backward also a product and a difference.
FORWARD, BACKWARD = 6, 10


def cases() -> Iterator[Case]:
    """Yield entries, and gradients, of rows that are one document and of packed ones."""
    f32, shape = jnp.float32, jax.ShapeDtypeStruct
    for name, (ratio, series, k, rounded) in KINDS.items():
        c = TOKENS // ratio
        tokens, angles = shape((1, TOKENS, series, k), f32), shape((1, c, ANGLES), f32)
        bias, norm = shape((ratio, series, k), f32), shape((k,), f32)
        arguments = tokens, tokens, bias, norm, angles, angles
        entries = shape((1, c, k), jnp.bfloat16)
        start, previous = shape((1, c), jnp.int32), shape((1, c), jnp.bool_)
        read, written = 2 * 4 * tokens.size, 2 * entries.size
        run = functools.partial(_entries, rounded)
        packed = functools.partial(_special, ratio, len(arguments))
        yield Case("compressor", name, run, arguments, FORWARD * tokens.size, read + written)
        yield Case(
            "compressor", f"{name}, packed", run, (*arguments, start, previous),
            FORWARD * tokens.size, read + written, covered=True, special=packed,
        )
        yield Case(
            "compressor", f"{name}, gradients", functools.partial(_gradients, rounded),
            (arguments, entries), (FORWARD + BACKWARD) * tokens.size, 2 * read + written,
        )


def _entries(rounded: bool, implementation: str) -> Callable:
    return functools.partial(
        compress, eps=1e-6, dtype=jnp.bfloat16, rounded=rounded, implementation=implementation
    )


def _gradients(rounded: bool, implementation: str) -> Callable:
    def gradients(arguments, grad):
        operands, angles = arguments[:4], arguments[4:]
        entries = _entries(rounded, implementation)
        return jax.vjp(lambda *x: entries(*x, *angles), *operands)[1](grad)

    return gradients


def _special(ratio: int, place: int, rng: np.random.Generator) -> dict[int, np.ndarray]:
    """Return where blocks begin: in two documents, the second of which is not on the first's grid.

    The slot for the tokens in between is the last, and of no entry.
    """
    c = TOKENS // ratio
    first = int(rng.integers(1, c - 1))
    start = np.arange(c) * ratio
    start[first:] += ratio // 2
    start[-1] = 0
    previous = (np.arange(c) > 0) & (np.arange(c) != first)
    return {place: start[None], place + 1: previous[None]}
