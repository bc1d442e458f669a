"""Arrays of the compressor as its kernels on TPU take them: in whole blocks and registers."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.blocks import largest_block, pad_axes
from pallas_kernels.compressor.form import Operands
from pallas_kernels.compressor.index import SUBLANES, Rows
from pallas_kernels.cost import estimate
from pallas_kernels.index_math import cdiv
from pallas_kernels.target import TPU, target_platform

LANES = 128
ELEMENTS = 2**18  # of values in a step, if 8 entries have no more
ENTRIES = 8, 16, 32, 64, 128  # of a step
MEMORY = 48 * 2**20


class Fitted(NamedTuple):
    """Arrays filled up to whole blocks, whose series lie side by side."""

    values: Float[Array, "b t columns"]
    gates: Float[Array, "b t columns"]
    bias: Float[Array, "u rows k"]  # repeated to whole tiles
    norm: Float[Array, "1 k"]
    turn: Float[Array, "b c lanes"]  # cosines, for each channel
    swap: Float[Array, "b c lanes"]  # sines, with their signs
    previous: Float[Array, "b c 1"] | None  # with two series


class Sizes(NamedTuple):
    """What the kernels are made for."""

    rows: Rows
    series: int
    blocks: int
    width: int  # of entries, without padding
    angles: int

    @property
    def lanes(self) -> int:
        """Channels, in whole registers."""
        return cdiv(self.width, LANES) * LANES

    @property
    def plain(self) -> int:
        """Channels that are not rotated."""
        return self.width - 2 * self.angles

    @property
    def tail(self) -> int:
        """The first lane of the registers that have rotated channels."""
        return self.plain // LANES * LANES


def sizes_of(x: Operands) -> Sizes:
    """Choose how many entries a step has."""
    ratio, series, k = x.bias.shape
    c = x.cos.shape[1]
    row = ratio * series * cdiv(k, LANES) * LANES
    most = max((n for n in ENTRIES if n * row <= ELEMENTS), default=ENTRIES[0])
    entries = largest_block(c, most, SUBLANES)
    rows = Rows(ratio, entries)
    return Sizes(rows, series, cdiv(x.values.shape[1], rows.tokens), k, x.cos.shape[-1])


def fit(x: Operands, sizes: Sizes) -> Fitted:
    """Fill arrays up to whole blocks."""

    def tokens(v):
        v = pad_axes(v, {1: sizes.rows.tokens, 3: LANES})
        return v.reshape(*v.shape[:2], -1)

    count = sizes.blocks * sizes.rows.entries

    def of_entries(v, fill):
        missing = ((0, 0), (0, count - v.shape[1]), (0, 0))
        return jnp.pad(v, missing, constant_values=fill)

    def lanes(v, fill):
        left, right = sizes.plain - sizes.tail, sizes.lanes - sizes.width
        return of_entries(jnp.pad(v, ((0, 0), (0, 0), (left, right)), constant_values=fill), fill)

    sines = jnp.stack([-x.sin, x.sin], axis=-1).reshape(*x.sin.shape[:2], -1)
    repeats = sizes.rows.tokens_before // sizes.rows.ratio
    bias = jnp.tile(pad_axes(x.bias, {2: LANES}).swapaxes(0, 1), (1, repeats, 1))
    previous = of_entries(x.has_previous[..., None].astype(jnp.float32), 0.0)
    return Fitted(
        tokens(x.values), tokens(x.gates), bias, pad_axes(x.norm[None], {1: LANES}),
        lanes(jnp.repeat(x.cos, 2, axis=-1), 1.0), lanes(sines, 0.0),
        previous if sizes.series == 2 else None,
    )


def arrays(x: Fitted) -> tuple[Array, ...]:
    """Return what kernels are given: with two series once more what tokens before are read from."""
    return x[:-1] if x.previous is None else (*x, x.values, x.gates)


def specs(sizes: Sizes, place) -> list[pl.BlockSpec]:
    """Return the blocks of a step; `place` says which they are."""
    rows, k = sizes.rows, sizes.lanes

    def of(length: int, columns: int, at=place) -> pl.BlockSpec:
        return pl.BlockSpec((None, length, columns), lambda b, i: (b, at(i), 0))

    tokens, turns = of(rows.tokens, sizes.series * k), of(rows.entries, k - sizes.tail)
    blocks = [
        tokens, tokens,
        pl.BlockSpec((sizes.series, rows.tokens_before, k), lambda b, i: (0, 0, 0)),
        pl.BlockSpec((1, k), lambda b, i: (0, 0)), turns, turns,
    ]
    if sizes.series == 2:
        before = of(rows.tokens_before, k, lambda i: rows.before(place(i)))
        blocks += [of(rows.entries, 1), before, before]
    return blocks


def named(refs, sizes: Sizes) -> tuple[Fitted, tuple]:
    """Return the kernel's references to `arrays`: all, and what tokens before are read from."""
    if sizes.series == 2:
        return Fitted(*refs[:7]), tuple(refs[7:])
    return Fitted(*refs, None), ()


def token_scratch(sizes: Sizes) -> list:
    """Return memory for 128 channels of values and gates."""
    return [floats(sizes.rows.tokens, LANES)] * 2


def floats(*shape: int):
    """Return memory for float32 numbers."""
    return pltpu.VMEM(shape, jnp.float32)


def options(name: str, steps: str, *arrays) -> dict:
    """Return what all kernels are called with.

    Args:
      steps: says how blocks of entries follow.
      arrays: trees of those that are read and written.
    """
    return {
        "cost_estimate": estimate(0, *arrays),
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=("parallel", steps), vmem_limit_bytes=MEMORY
        ),
        "interpret": target_platform() != TPU, "name": name,
    }
