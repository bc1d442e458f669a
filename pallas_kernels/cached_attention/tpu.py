"""Cached attention on TPU: a program for each query, over blocks of stored rows.

Rows of bytes lie 32 to a tile, so that one alone cannot be copied: entries of a range are read in
blocks where they lie; chosen ones and the ring XLA copies before, as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.blocks import pad_axes
from pallas_kernels.cached_attention.formats import GROUP, Form
from pallas_kernels.cached_attention.index import Ring, Steps, sees_new
from pallas_kernels.codes import powers
from pallas_kernels.cost import estimate
from pallas_kernels.sparse_attention.tpu_queries import fold_softmax, numbers_of, product
from pallas_kernels.target import TPU, target_platform

ENTRIES = 256  # of a block
LANES, HEADS = 128, 16
MEMORY = 32 * 2**20


class Numbers(NamedTuple):
    """What index maps and masks need; each is in the memory of scalars."""

    layer: Int[Array, " 1"]
    start: Int[Array, " b"]
    end: Int[Array, "b t"]  # of entries, or of chosen ones


def forward(
    q: Float[Array, "b t h k"], new, sink, cached, form: Form, invariant: bool
) -> Float[Array, "b t h k"]:
    """Return the output, as `cached_attention` does; a row's bits are its own in any case."""
    b, t, h, k = q.shape
    q, sink = pad_axes(q, {2: HEADS}), pad_axes(sink.astype(jnp.float32), {0: HEADS})
    entries, chosen = cached.entries, cached.chosen
    end = jnp.zeros((b, t), jnp.int32)
    if chosen is not None:
        chosen = pad_axes(chosen, {2: ENTRIES}, fill=-1)
        end = jnp.full((b, t), chosen.shape[2], jnp.int32)
        rows = jnp.arange(b)[:, None, None]
        entries = entries[cached.layer, rows, jnp.maximum(chosen, 0)]
        chosen = chosen[:, :, None]
    elif entries is not None:
        end = cached.end.astype(jnp.int32)
    numbers = Numbers(cached.layer[None], cached.start, end)
    # The call writes to the ring after the kernel: read where it lies, XLA copies all layers.
    keys = jnp.concatenate([cached.ring[cached.layer], new], axis=1)
    return attend(q, keys, sink[:, None], entries, chosen, numbers, form)[:, :, :h]


def attend(
    q: Float[Array, "b t h k"], keys: Array, sink: Float[Array, "h 1"], entries: Array | None,
    chosen: Int[Array, "b t 1 l"] | None, numbers: Numbers, form: Form,
) -> Float[Array, "b t h k"]:
    """Return the output for each query.

    Args:
      keys: a row's ring, then the call's: [b, slots + t, width].
      entries: [z, b, c, width] or, with chosen, these alone: [b, t, l, width].
    """
    b, t, h, k = q.shape
    steps, slots = Steps(ENTRIES), keys.shape[1] - t

    def kernel(layer_ref, start_ref, end_ref, q_ref, sink_ref, keys_ref, *refs):
        *entry_refs, out_ref, top, total, out = refs
        row, place, step = map(pl.program_id, range(3))
        start, end = start_ref[row], end_ref[row, place]

        def fold(kv, seen):
            logits = product(q_ref[...], kv, 1, 1) * k**-0.5
            fold_softmax(jnp.where(seen, logits, -jnp.inf), kv, top, total, out)

        @pl.when(step == 0)
        def _():
            # The sink is part of every softmax, so that it makes a finite first maximum.
            top[...], total[...] = sink_ref[...], jnp.ones_like(total)
            out[...] = jnp.zeros_like(out)
            key = numbers_of(1, keys.shape[1], 1)
            seen = Ring(slots).sees(place, key, start) & (key < slots)
            seen |= (key >= slots) & sees_new(place, key - slots)
            fold(decode_rows(keys_ref[...], form, q.dtype), seen)

        if entry_refs:
            pl.when(steps.wanted(step, end))(lambda: fold(*_entries(
                entry_refs, steps.first(step), end, form, q.dtype
            )))

        @pl.when(step == pl.num_programs(2) - 1)
        def _():
            out_ref[...] = (out[...] / total[...]).astype(out_ref.dtype)

    operands, specs, blocks = _operands(q, keys, sink, entries, chosen, steps)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(numbers),
            grid=(b, t, 1 + blocks),
            in_specs=specs,
            out_specs=specs[0],
            scratch_shapes=[pltpu.VMEM((h, n), jnp.float32) for n in (1, 1, k)],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=MEMORY
        ),
        cost_estimate=estimate(4 * q.size * (keys.shape[1] + blocks * ENTRIES), *operands, q),
        interpret=target_platform() != TPU,
        name="attend_cached",
    )(*numbers, *operands)


def _entries(refs, first, end, form: Form, dtype) -> tuple[Array, Array]:
    """Return the entries of a block and which of them are seen.

    Args:
      refs: of stored entries and, where entries are chosen, of their numbers.
      first: entry of the block.
    """
    entries_ref, *chosen_refs = refs
    kv = decode_rows(entries_ref[...], form, dtype)
    # What lies past the array is anything, not a number perhaps.
    kv = jnp.where(first + numbers_of(ENTRIES, 1, 0) < end, kv, 0)
    if chosen_refs:
        return kv, chosen_refs[0][...] >= 0
    return kv, first + numbers_of(1, ENTRIES, 1) < end


def _operands(
    q, keys, sink, entries, chosen, steps: Steps
) -> tuple[list[Array], list[pl.BlockSpec], int]:
    """Return the operands, their blocks, and how many blocks of entries there are."""
    h, k = q.shape[2:]
    operands = [q, sink, keys]
    specs = [
        pl.BlockSpec((None, None, h, k), lambda b, t, s, *_: (b, t, 0, 0)),
        pl.BlockSpec(sink.shape, lambda b, t, s, *_: (0, 0)),
        pl.BlockSpec((None, *keys.shape[1:]), lambda b, t, s, *_: (b, 0, 0)),
    ]
    if entries is None:
        return operands, specs, 0

    def at(make: Callable) -> Callable:
        return lambda b, t, s, z, start, end: make(b, t, steps.read(s, end[b, t]), z[0])

    shape = (None, None, ENTRIES, entries.shape[3])
    operands.append(entries)
    if chosen is None:
        specs.append(pl.BlockSpec(shape, at(lambda b, t, block, layer: (layer, b, block, 0))))
    else:
        specs.append(pl.BlockSpec(shape, at(lambda b, t, block, layer: (b, t, block, 0))))
        operands.append(chosen)
        shape = (None, None, 1, ENTRIES)
        specs.append(pl.BlockSpec(shape, at(lambda b, t, block, layer: (b, t, 0, block))))
    return operands, specs, -(-entries.shape[2] // ENTRIES)


def decode_rows(rows: Array, form: Form, dtype) -> Float[Array, "s k"]:
    """Return stored rows as numbers.

    Products with ones and zeros move bytes to their channels: numbers up to 255 and powers of two
    are exact in bfloat16, and so are sums of one.
    """
    if not form.served:
        return rows.astype(dtype)
    codes = pltpu.bitcast(rows[:, : form.channels], jnp.float8_e4m3fn).astype(jnp.float32)
    first = form.plain // LANES * LANES  # what is not codes lies from here on
    rest = rows[:, first:].astype(jnp.int32)
    byte, channel = first + numbers_of(rest.shape[1], 1, 0), numbers_of(1, form.channels, 1)
    scales = jnp.where(first + numbers_of(1, rest.shape[1], 1) >= form.scales, powers(rest), 0)
    group = byte - form.scales
    values = codes * _moved(scales, (channel < form.plain) & _divides(channel, GROUP, group))
    if not form.rotated:
        return values.astype(dtype)
    # Channels from `first` on again, for they alone may be rotated.
    turned = first + numbers_of(1, form.channels - first, 1) - form.plain
    low, high = (
        _moved(rest.astype(jnp.float32), (turned >= 0) & (byte - form.plain == 2 * turned + half))
        for half in (0, 1)
    )
    bits = (low.astype(jnp.int32) << 16) | (high.astype(jnp.int32) << 24)
    turned_values = jax.lax.bitcast_convert_type(bits, jnp.float32)
    last = jnp.where(turned >= 0, turned_values, values[:, first:])
    values = jnp.concatenate([values[:, :first], last], axis=1) if first else last
    return values.astype(dtype)


def _divides(channel, size: int, group):
    """Say whether a channel is of a group of so many."""
    return (channel >= group * size) & (channel < (group + 1) * size)


def _moved(x: Float[Array, "s r"], goes) -> Float[Array, "s k"]:
    """Move columns to where they go."""
    return product(x.astype(jnp.bfloat16), goes.astype(jnp.float32).astype(jnp.bfloat16), 1, 0)

