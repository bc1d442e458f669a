"""Sparse attention on GPU: a program for each query and group of heads; keys gathered by rows.

The heads of a query are the rows of the matrix products, the keys that it sees their columns: its
window, then its entries, tile by tile, read straight from where they lie. Rows of 64 heads and 512
channels fill half of a multiprocessor's registers, so that a program holds no second query.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.blocks import pad_axes, power_of_two
from pallas_kernels.sparse_attention.index import Entries, Window
from pallas_kernels.sparse_attention.seen import Seen
from pallas_kernels.target import GPU, target_platform

LOG2_E = math.log2(math.e)  # exponentials are those of 2


class Tiles(NamedTuple):
    """How the work is cut up."""

    heads: int  # of a query in one program
    keys: int  # of a tile
    warps: int
    stages: int  # tiles whose loads are under way


FORWARD = Tiles(64, 32, 8, 3)
QUERY_GRADIENT = Tiles(64, 32, 8, 2)


class Fitted(NamedTuple):
    """Operands whose sizes the kernels take, filled up with zeros: heads, channels, chosen."""

    q: Float[Array, "b t h k"]
    keys: Float[Array, "b s k"]
    entries: Float[Array, "b c k"] | None
    sink: Float[Array, " h"]
    seen: Seen


class Rows(NamedTuple):
    """What belongs to queries in backward passes.

    `drop` is the sum of output and its gradient over channels: what a logit's gradient loses by
    the softmax's total.
    """

    q: Float[Array, "*b t h k"]
    grad: Float[Array, "*b t h k"]  # of the output
    log_total: Float[Array, "*b t h"]
    drop: Float[Array, "*b t h"]


def fitted(q, keys, entries, sink, seen: Seen) -> Fitted:
    """Fill up to whole groups of heads, a power of two of channels and whole tiles of chosen."""
    if seen.chosen is not None:
        seen = seen._replace(chosen=pad_axes(seen.chosen, {2: FORWARD.keys}, fill=-1))
    channels = power_of_two(q.shape[3])
    return Fitted(
        fitted_rows(q),
        pad_axes(keys, {2: channels}),
        None if entries is None else pad_axes(entries, {2: channels}),
        pad_axes(sink.astype(jnp.float32), {0: _whole_heads(q.shape[2])}),
        seen,
    )


def fitted_rows(x: Array) -> Array:
    """Fill up an array [b, t, h, k] or [b, t, h] as the queries are."""
    multiples = {2: _whole_heads(x.shape[2])}
    return pad_axes(x, multiples | ({3: power_of_two(x.shape[3])} if x.ndim == 4 else {}))


def _whole_heads(heads: int) -> int:
    return min(FORWARD.heads, power_of_two(heads))


def attend(
    q: Float[Array, "b t h k"], keys: Float[Array, "b s k"], entries: Float[Array, "b c k"] | None,
    sink: Float[Array, " h"], seen: Seen, *, window: int, scale: float,
) -> tuple[Float[Array, "b t h k"], Float[Array, "b t h"]]:
    """Return the output and the logarithm of the softmax's total; arguments as `fitted`."""
    tiles = FORWARD
    heads, width = min(tiles.heads, q.shape[2]), q.shape[3]
    before = keys.shape[1] - q.shape[1]

    def kernel(q_ref, sink_ref, keys_ref, *refs):
        *seen_refs, out_ref, total_ref = refs
        fold = softmax_fold(q_ref[...], scale)
        # The sink is part of every softmax, so that it makes a finite first maximum.
        top = sink_ref[...] * LOG2_E
        state = top, jnp.ones_like(top), jnp.zeros((heads, width), jnp.float32)
        query = before + pl.program_id(0)
        see = Window(window, tiles.keys)
        top, total, out = over_tiles(see, query, keys_ref, seen_refs, fold, state)
        out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
        total_ref[...] = (top + jnp.log2(total)) / LOG2_E

    b, t, h, _ = q.shape
    rows, row = _row_specs(heads, width)
    return pl.pallas_call(
        kernel,
        grid=(t, b, h // heads),
        in_specs=[
            rows, pl.BlockSpec((heads,), lambda i, b, g: g), *_key_specs(keys, entries, seen),
        ],
        out_specs=[rows, row],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, t, h), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=target_platform() != GPU,
        name="attend",
    )(q, sink, *_operands(keys, entries, seen))


def softmax_fold(q: Float[Array, "h k"], scale: float) -> Callable:
    """Return what folds a tile into a softmax, as `over_tiles` takes it.

    The state is the maximum of the logits, in powers of 2, the total and the output.
    """

    def fold(state, kv, visible):
        top, total, out = state
        logits = plgpu.dot(q, kv, trans_b=True) * (scale * LOG2_E)
        logits = jnp.where(visible[None, :], logits, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(logits, axis=1))
        weights, shrink = jnp.exp2(logits - new_top[:, None]), jnp.exp2(top - new_top)
        out = out * shrink[:, None] + plgpu.dot(weights.astype(kv.dtype), kv)
        return new_top, total * shrink + jnp.sum(weights, axis=1), out

    return fold


def query_gradient(
    rows: Rows, keys: Float[Array, "b t k"], entries: Float[Array, "b c k"] | None, seen: Seen, *,
    window: int, scale: float,
) -> Float[Array, "b t h k"]:
    """Return the gradient of the queries; arguments as `fitted`."""
    tiles, (b, t, h, width) = QUERY_GRADIENT, rows.q.shape
    heads = min(tiles.heads, h)

    def kernel(q_ref, grad_ref, total_ref, drop_ref, keys_ref, *refs):
        *seen_refs, out_ref = refs
        q_rows, grad_rows = q_ref[...], grad_ref[...]
        log_total, drop = total_ref[...] * LOG2_E, drop_ref[...]

        def fold(out, kv, visible):
            logits = plgpu.dot(q_rows, kv, trans_b=True) * (scale * LOG2_E)
            weights = jnp.exp2(jnp.where(visible[None, :], logits, -jnp.inf) - log_total[:, None])
            error = weights * (plgpu.dot(grad_rows, kv, trans_b=True) - drop[:, None])
            return out + plgpu.dot(error.astype(kv.dtype), kv)

        out = jnp.zeros((heads, width), jnp.float32)
        see = Window(window, tiles.keys)
        out = over_tiles(see, pl.program_id(0), keys_ref, seen_refs, fold, out)
        out_ref[...] = (out * scale).astype(out_ref.dtype)

    of_rows, of_row = _row_specs(heads, width)
    return pl.pallas_call(
        kernel,
        grid=(t, b, h // heads),
        in_specs=[of_rows, of_rows, of_row, of_row, *_key_specs(keys, entries, seen)],
        out_specs=of_rows,
        out_shape=jax.ShapeDtypeStruct(rows.q.shape, rows.q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=target_platform() != GPU,
        name="query_gradient",
    )(*rows, *_operands(keys, entries, seen))


def over_tiles(see: Window, query, keys_ref, seen_refs, fold: Callable, state):
    """Fold all that a query sees into a state.

    Args:
      query: where it stands among the keys.
      seen_refs: of the first key and, if there are entries, these and which of them are seen.
      fold: from a state, a tile of key-values and which of them are seen to a state.
    """
    first_key_ref, *entry_refs = seen_refs
    tile = see.tile
    state = _over_range(tile, keys_ref, *see.seen(query, first_key_ref[...]), fold, state)
    if len(entry_refs) == 2:
        return _over_chosen(tile, *entry_refs, fold, state)
    if len(entry_refs) == 3:
        entries_ref, first_ref, end_ref = entry_refs
        return _over_range(tile, entries_ref, first_ref[...], end_ref[...], fold, state)
    return state


def _over_range(tile: int, entries_ref, first, end, fold: Callable, state):
    entries = Entries(tile)

    def range_tile(i, state):
        entry = entries.entry(first, i, jnp.arange(tile))
        kv = entries_ref[entries.row(entry, end), :]
        return fold(state, kv, entries.sees(end, entry))

    return jax.lax.fori_loop(0, entries.tiles(first, end), range_tile, state)


def _over_chosen(tile: int, entries_ref, chosen_ref, fold: Callable, state):
    def chosen_tile(i, state):
        entry = chosen_ref[pl.ds(i * tile, tile)]
        kv = entries_ref[jnp.maximum(entry, 0), :]
        return fold(state, kv, entry >= 0)

    return jax.lax.fori_loop(0, chosen_ref.shape[0] // tile, chosen_tile, state)


def _row_specs(heads: int, width: int) -> tuple[pl.BlockSpec, pl.BlockSpec]:
    """Return the blocks of a program's rows [b, t, h, k] and of one number each [b, t, h]."""
    return (
        pl.BlockSpec((None, None, heads, width), lambda i, b, g: (b, i, g, 0)),
        pl.BlockSpec((None, None, heads), lambda i, b, g: (b, i, g)),
    )


def _operands(keys, entries, seen: Seen) -> list[Array]:
    if entries is None:
        return [keys, seen.first_key]
    if seen.chosen is not None:
        return [keys, seen.first_key, entries, seen.chosen]
    return [keys, seen.first_key, entries, seen.first, seen.end]


def _key_specs(keys, entries, seen: Seen) -> list[pl.BlockSpec]:
    """Return the blocks of `_operands`: whole rows, and what belongs to the query."""

    def spec(x):
        if x is keys or x is entries:
            return pl.BlockSpec((None, *x.shape[1:]), lambda i, b, g: (b, 0, 0))
        rest = x.shape[2:]
        return pl.BlockSpec((None, None, *rest), lambda i, b, g: (b, i, *(0 for _ in rest)))

    return [spec(x) for x in _operands(keys, entries, seen)]
