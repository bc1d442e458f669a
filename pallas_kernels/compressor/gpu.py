"""Entries on GPU: one program for each, which loads the rows of its blocks from where they begin.

A program holds an entry's channels in three parts: those that are not rotated, and the first and
the second ones of rotated pairs, which are thus rotated without an exchange between threads.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.blocks import power_of_two
from pallas_kernels.compressor.form import Form, Operands
from pallas_kernels.compressor.index import Block, Channels, parts
from pallas_kernels.index_math import Index, cdiv
from pallas_kernels.rounding import E4M3, nearest
from pallas_kernels.target import GPU, target_platform

ELEMENTS = 4096  # of values that a program loads at once
WARPS = 4
LEAST = -1e30  # below any gate


class Pool(NamedTuple):
    """A softmax-weighted average of some channels."""

    sums: Float[Array, " n"]
    largest: Float[Array, " n"]
    total: Float[Array, " n"]

    def add(self, value: Float[Array, "r n"], gate: Float[Array, "r n"]) -> Pool:
        """Return the average of more rows."""
        largest = jnp.maximum(self.largest, jnp.max(gate, axis=0))
        weight, decay = jnp.exp(gate - largest), jnp.exp(self.largest - largest)
        return Pool(
            decay * self.sums + jnp.sum(weight * value, axis=0), largest,
            decay * self.total + jnp.sum(weight, axis=0),
        )

    @property
    def average(self) -> Float[Array, " n"]:
        """The average."""
        return self.sums / self.total


class Part(NamedTuple):
    """A part of an entry's channels, as an array whose size is a power of two."""

    channels: Channels

    @property
    def size(self) -> int:
        """Its size."""
        return power_of_two(self.channels.count)

    def indices(self) -> tuple[Array, Array]:
        """Return the channels, and whether each is there."""
        i = jnp.arange(self.size)
        return self.channels.at(i), self.channels.there(i)

    def load(self, ref) -> Float[Array, " n"]:
        """Load from an array of channels."""
        at, there = self.indices()
        return plgpu.load(ref.at[at], mask=there, other=0.0).astype(jnp.float32)

    def store(self, ref, x: Float[Array, " n"]) -> None:
        """Store to an array of channels."""
        at, there = self.indices()
        plgpu.store(ref.at[at], x.astype(ref.dtype), mask=there)

    def angles(self, cos, sin) -> tuple[Array, Array]:
        """Load the cosine and sine of each pair."""
        i = jnp.arange(self.size)
        there = self.channels.there(i)
        return tuple(plgpu.load(ref.at[i], mask=there, other=0.0) for ref in (cos, sin))


class Tokens(NamedTuple):
    """The rows of an entry, to be loaded some slots at a time."""

    block: Block
    rows: int  # at once
    refs: tuple  # values, gates, bias, start, previous

    @property
    def steps(self) -> int:
        """How often rows are loaded."""
        return cdiv(self.block.slots, self.rows)

    def places(self, n: Index) -> tuple[Array, Array, Array]:
        """Return the rows of some slots, those of their bias, and whether they are used."""
        *_, start, previous = self.refs
        slot = n * self.rows + jnp.arange(self.rows)
        used = self.block.used(slot, previous[...])
        places = self.block.row(start[...], slot), self.block.bias(slot), used
        return tuple(x[:, None] for x in places)

    def load(self, places: tuple[Array, Array, Array], part: Part) -> tuple[Array, Array]:
        """Load values and gates of a part of the channels."""
        (row, bias_row, used), (values, gates, bias, *_) = places, self.refs
        at, there = (x[None] for x in part.indices())
        wanted = used & there
        value, gate, added = (
            plgpu.load(ref.at[place, at], mask=wanted, other=0.0)
            for ref, place in ((values, row), (gates, row), (bias, bias_row))
        )
        return value, jnp.where(used, gate + added, -jnp.inf)

    def pool(self, parts: tuple[Part, ...]) -> tuple[Pool, ...]:
        """Average each part."""

        def step(n, pools):
            places = self.places(n)
            pairs = zip(pools, parts, strict=True)
            return tuple(pool.add(*self.load(places, part)) for pool, part in pairs)

        zeros = [jnp.zeros(part.size, jnp.float32) for part in parts]
        start = tuple(Pool(zero, zero + LEAST, zero) for zero in zeros)
        return jax.lax.fori_loop(0, self.steps, step, start)


def forward(x: Operands, form: Form) -> Float[Array, "b c k"]:
    """Compute `reference.compress`; values and gates are read once."""
    b, c = x.start.shape
    k = x.norm.shape[0]
    channels = _parts(x)

    def kernel(values, gates, bias, norm, cos, sin, start, previous, out):
        tokens = Tokens(x.block, _rows(x), (values, gates, bias, start, previous))
        pooled = [pool.average for pool in tokens.pool(channels)]
        inverse = _inverse_rms(pooled, k, form.eps)
        plain, first, second = (
            (value * inverse * part.load(norm)).astype(form.dtype).astype(jnp.float32)
            for value, part in zip(pooled, channels, strict=True)
        )
        cosine, sine = channels[1].angles(cos, sin)
        first, second = first * cosine - second * sine, first * sine + second * cosine
        if form.rounded:
            plain = _rounded(plain)
            first, second = (v.astype(jnp.bfloat16) for v in (first, second))
        for part, value in zip(channels, (plain, first, second), strict=True):
            part.store(out, value)

    return pl.pallas_call(
        kernel, grid=(c, b), in_specs=_specs(x),
        out_specs=pl.BlockSpec((None, None, k), _entry),
        out_shape=jax.ShapeDtypeStruct((b, c, k), form.dtype),
        **_options("compress"),
    )(*_arrays(x))


def gradients(
    x: Operands, grad: Float[Array, "b c k"], form: Form
) -> tuple[Array, Array, Array, Array]:
    """Return the gradients of values, gates, bias and norm.

    Blocks of entries that there are do not overlap: a row is written once at most. All others keep
    the zeros that they are given.
    """
    b, c = x.start.shape
    k = x.norm.shape[0]
    channels = _parts(x)

    def kernel(values, gates, bias, norm, cos, sin, start, previous, grad, exists, *refs):
        _, _, grad_values, grad_gates, grad_norm = refs
        tokens = Tokens(x.block, _rows(x), (values, gates, bias, start, previous))
        pools = tokens.pool(channels)
        pooled = [pool.average for pool in pools]
        plain, first, second = (part.load(grad) for part in channels)
        cosine, sine = channels[1].angles(cos, sin)
        grads = plain, first * cosine + second * sine, second * cosine - first * sine
        inverse = _inverse_rms(pooled, k, form.eps)
        scaled = []
        for part, value, g in zip(channels, pooled, grads, strict=True):
            part.store(grad_norm, g * value * inverse)
            scaled.append(g * part.load(norm))
        along = sum(jnp.sum(s * v) for s, v in zip(scaled, pooled, strict=True))
        along = along * inverse * inverse / k

        def step(n, carry):
            places = tokens.places(n)
            row, _, used = places
            for part, pool, value, s in zip(channels, pools, pooled, scaled, strict=True):
                grad_pooled = inverse * (s - value * along)
                token, gate = tokens.load(places, part)
                weight = jnp.exp(gate - pool.largest) / pool.total * grad_pooled
                at, there = (i[None] for i in part.indices())
                mask = used & there & exists[...]
                plgpu.store(grad_values.at[row, at], weight, mask=mask)
                plgpu.store(grad_gates.at[row, at], weight * (token - value), mask=mask)
            return carry

        jax.lax.fori_loop(0, tokens.steps, step, 0)

    entry = pl.BlockSpec((None, None, k), _entry)
    token_rows = _token_rows(x)
    zeros = jnp.zeros((b, x.values.shape[1] * x.block.series, k), jnp.float32)
    shape = jax.ShapeDtypeStruct(zeros.shape, jnp.float32)
    grad_values, grad_gates, grad_norm = pl.pallas_call(
        kernel, grid=(c, b),
        in_specs=(
            *_specs(x), entry, pl.BlockSpec((None, None), _entry_only), token_rows, token_rows,
        ),
        out_specs=(token_rows, token_rows, entry),
        out_shape=(shape, shape, jax.ShapeDtypeStruct((b, c, k), jnp.float32)),
        input_output_aliases={10: 0, 11: 1},
        **_options("compress_gradients"),
    )(*_arrays(x), grad, x.exists, zeros, zeros)
    grad_bias = _grad_bias(grad_gates, x)
    return (
        grad_values.reshape(x.values.shape), grad_gates.reshape(x.gates.shape), grad_bias,
        jnp.sum(grad_norm, axis=(0, 1)),
    )


def _grad_bias(grad_gates: Float[Array, "b r k"], x: Operands) -> Float[Array, "ratio u k"]:
    """Sum the gradients of gates over blocks: XLA fuses taking the rows with their sum."""
    slot = jnp.arange(x.block.slots)
    rows = x.block.row(x.start[..., None], slot)
    used = x.exists[..., None] & x.block.used(slot, x.has_previous[..., None])
    taken = jax.vmap(lambda row, i: row[i])(grad_gates, rows)
    sums = jnp.sum(jnp.where(used[..., None], taken, 0), axis=(0, 1))
    return jnp.zeros_like(sums).at[x.block.bias(slot)].set(sums).reshape(x.bias.shape)


def _parts(x: Operands) -> tuple[Part, ...]:
    return tuple(Part(channels) for channels in parts(x.norm.shape[0], x.cos.shape[-1]))


def _rows(x: Operands) -> int:
    """Return how many rows a program loads at once."""
    slots = power_of_two(x.block.slots, 1)
    return max(1, min(slots, ELEMENTS // power_of_two(x.norm.shape[0])))


def _entry(i, z):
    return z, i, 0


def _entry_only(i, z):
    return z, i


def _options(name: str) -> dict:
    return {
        "compiler_params": plgpu.CompilerParams(num_warps=WARPS),
        "interpret": target_platform() != GPU, "name": name,
    }


def _arrays(x: Operands) -> tuple[Array, ...]:
    k = x.norm.shape[0]
    rows = (array.reshape(array.shape[0], -1, k) for array in (x.values, x.gates))
    return *rows, x.bias.reshape(-1, k), x.norm, x.cos, x.sin, x.start, x.has_previous


def _token_rows(x: Operands) -> pl.BlockSpec:
    _, t, series, k = x.values.shape
    return pl.BlockSpec((None, t * series, k), lambda i, z: (z, 0, 0))


def _specs(x: Operands) -> tuple[pl.BlockSpec, ...]:
    k = x.norm.shape[0]
    rows, scalar = _token_rows(x), pl.BlockSpec((None, None), _entry_only)
    angles = pl.BlockSpec((None, None, x.cos.shape[-1]), _entry)
    return (
        rows, rows, pl.BlockSpec((x.block.slots, k), lambda i, z: (0, 0)),
        pl.BlockSpec((k,), lambda i, z: (0,)), angles, angles, scalar, scalar,
    )


def _inverse_rms(pooled: list[Float[Array, " n"]], width: int, eps: float) -> Float[Array, ""]:
    return jax.lax.rsqrt(sum(jnp.sum(value * value) for value in pooled) / width + eps)


def _rounded(plain: Float[Array, " n"]) -> Float[Array, " n"]:
    groups = plain.reshape(-1, min(plain.shape[0], E4M3.group))
    return nearest(groups, jnp.max(jnp.abs(groups), axis=1, keepdims=True), E4M3).reshape(-1)
