"""Pooled entries on GPU: one program for each entry, which loads the rows of its blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.compressor.index import Block
from pallas_kernels.target import GPU, target_platform

ELEMENTS = 4096  # of values that a program loads at once
WARPS = 4
LEAST = -1e30  # below any gate


def pooled_entries(
    values: Float[Array, "b t u k"], gates: Float[Array, "b t u k"],
    bias: Float[Array, "ratio u k"], norm: Float[Array, " k"], start: Int[Array, "b c"],
    has_previous: Bool[Array, "b c"], eps: float,
) -> Float[Array, "b c k"]:
    """Compute `reference.pooled_entries`; values and gates are read once."""
    block, rows = Block(*bias.shape[:2]), _rows(bias)
    b, c = start.shape

    def kernel(values, gates, bias, norm, start, previous, out):
        load = _loader(block, rows, values, gates, bias, start, previous)
        pooled, _, _ = _pool(load, block, rows, norm.shape[0])
        out[...] = pooled * _inverse_rms(pooled, eps) * norm[...]

    return pl.pallas_call(
        kernel, grid=(c, b),
        in_specs=_specs(values, bias),
        out_specs=pl.BlockSpec((None, None, values.shape[-1]), _entry),
        out_shape=jax.ShapeDtypeStruct((b, c, values.shape[-1]), jnp.float32),
        **_options("pooled_entries"),
    )(*_operands(values, gates, bias, norm, start, has_previous))


def gradients(
    values: Float[Array, "b t u k"], gates: Float[Array, "b t u k"],
    bias: Float[Array, "ratio u k"], norm: Float[Array, " k"], start: Int[Array, "b c"],
    has_previous: Bool[Array, "b c"], exists: Bool[Array, "b c"], eps: float,
    grad: Float[Array, "b c k"],
) -> tuple[Array, Array, Array]:
    """Return the gradients of values and gates, and each entry's part of that of the norm.

    Blocks of entries that there are do not overlap: a row is written once at most. All others keep
    the zeros that they are given.

    Args:
      exists: which entries there are.
    """
    block, rows = Block(*bias.shape[:2]), _rows(bias)
    b, c = start.shape
    k = values.shape[-1]

    def kernel(values, gates, bias, norm, start, previous, grad, *refs):
        exists, _, _, grad_values, grad_gates, grad_norm = refs
        load = _loader(block, rows, values, gates, bias, start, previous)
        pooled, largest, total = _pool(load, block, rows, k)
        inverse = _inverse_rms(pooled, eps)
        grad_norm[...] = grad[...] * pooled * inverse
        scaled = grad[...] * norm[...]
        along = jnp.sum(scaled * pooled) * inverse * inverse / k
        grad_pooled = inverse * (scaled - pooled * along)

        def step(n, carry):
            place, used, value, gate = load(n)
            weight = jnp.exp(gate - largest) / total * grad_pooled
            mask = used & exists[...]
            at = place, jnp.arange(k)[None]
            plgpu.store(grad_values.at[at], weight, mask=mask)
            plgpu.store(grad_gates.at[at], weight * (value - pooled), mask=mask)
            return carry

        jax.lax.fori_loop(0, block.slots // rows, step, 0)

    entry = pl.BlockSpec((None, None, k), _entry)
    token_rows = pl.BlockSpec((None, values.shape[1] * block.series, k), lambda i, z: (z, 0, 0))
    operands = _operands(values, gates, bias, norm, start, has_previous)
    zeros = jnp.zeros(operands[0].shape, jnp.float32)
    shape = jax.ShapeDtypeStruct(zeros.shape, jnp.float32)
    grad_values, grad_gates, grad_norm = pl.pallas_call(
        kernel, grid=(c, b),
        in_specs=(
            *_specs(values, bias), entry, pl.BlockSpec((None, None), _entry_only),
            token_rows, token_rows,
        ),
        out_specs=(token_rows, token_rows, entry),
        out_shape=(shape, shape, jax.ShapeDtypeStruct((b, c, k), jnp.float32)),
        input_output_aliases={8: 0, 9: 1},
        **_options("pooled_entries_gradients"),
    )(*operands, grad, exists, zeros, zeros)
    return grad_values.reshape(values.shape), grad_gates.reshape(gates.shape), grad_norm


def _rows(bias: Float[Array, "ratio u k"]) -> int:
    """Return how many rows a program loads at once."""
    ratio, series, k = bias.shape
    return max(1, min(ratio * series, ELEMENTS // k))


def _entry(i, z):
    return z, i, 0


def _entry_only(i, z):
    return z, i


def _options(name: str) -> dict:
    return {
        "compiler_params": plgpu.CompilerParams(num_warps=WARPS),
        "interpret": target_platform() != GPU, "name": name,
    }


def _operands(values, gates, bias, norm, start, has_previous) -> tuple[Array, ...]:
    k = norm.shape[0]
    rows = (x.reshape(x.shape[0], -1, k) for x in (values, gates))
    return *rows, bias.reshape(-1, k), norm, start, has_previous


def _specs(values: Array, bias: Array) -> tuple[pl.BlockSpec, ...]:
    _, t, series, k = values.shape
    rows = pl.BlockSpec((None, t * series, k), lambda i, z: (z, 0, 0))
    scalar = pl.BlockSpec((None, None), _entry_only)
    slots = bias.shape[0] * series
    return (
        rows, rows, pl.BlockSpec((slots, k), lambda i, z: (0, 0)),
        pl.BlockSpec((k,), lambda i, z: (0,)), scalar, scalar,
    )


def _loader(block: Block, rows: int, values, gates, bias, start, previous):
    """Return what loads some slots: their rows, whether they are used, values and gates."""

    def load(n):
        slot = n * rows + jnp.arange(rows)
        place = block.row(start[...], slot)[:, None]
        channels = jnp.arange(bias.shape[1])[None]
        used = block.used(slot, previous[...])[:, None]
        value = plgpu.load(values.at[place, channels], mask=used, other=0.0)
        gate = plgpu.load(gates.at[place, channels], mask=used, other=0.0)
        gate = gate + plgpu.load(bias.at[block.bias(slot)[:, None], channels])
        return place, used, value, jnp.where(used, gate, -jnp.inf)

    return load


def _pool(load, block: Block, rows: int, k: int) -> tuple[Array, Array, Array]:
    """Return the average, and the largest gate and the softmax's denominator of each channel."""

    def step(n, carry):
        _, _, value, gate = load(n)
        sums, largest, total = carry
        new = jnp.maximum(largest, jnp.max(gate, axis=0))
        weight, decay = jnp.exp(gate - new), jnp.exp(largest - new)
        return (
            decay * sums + jnp.sum(weight * value, axis=0), new,
            decay * total + jnp.sum(weight, axis=0),
        )

    zeros = jnp.zeros(k, jnp.float32)
    start = zeros, jnp.full(k, LEAST), zeros
    sums, largest, total = jax.lax.fori_loop(0, block.slots // rows, step, start)
    return sums / total, largest, total


def _inverse_rms(x: Float[Array, " k"], eps: float) -> Float[Array, ""]:
    return jax.lax.rsqrt(jnp.sum(x * x) / x.shape[0] + eps)
