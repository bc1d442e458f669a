"""What a device of a mesh gives to others and gets from them, inside of `shard_map`.

A function under `shard_map` runs on every device, on the part that lies there. Its gradient is that
of the sum, over all devices, of what it returns on each. Without a mesh nothing is exchanged.

Weights are gathered, and their gradients reduced and scattered, along one mesh axis after another.
It is as many bytes as along all at once, which libtpu 0.0.42 turns into an all-reduce of twice as
many if that joins all devices there are. It does the same to a reduce-scatter along a last axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from dsv4_jax.shapes import Array, Float, Int
from dsv4_jax.sharding import MESH_AXES, AxisSplit
from pallas_kernels.target import CPU, target_platform


def gather_weight(part: Array, split: Sequence[AxisSplit], dtype: jnp.dtype) -> Array:
    """Return a weight as it is used, rounded to this dtype, of the part that lies here.

    It has the part's dtype all the same, so that the gradients of all who use it, here and
    elsewhere, are added up in that: in float32.
    """
    shared = tuple((axis, names) for axis, (_, names) in enumerate(split) if names)
    return _gather(part, shared, dtype, part.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(part: Array, shared: tuple, dtype: jnp.dtype, stored: jnp.dtype) -> Array:
    # XLA would take a mere conversion out of a scan, round all layers before it and keep that.
    bits = jnp.finfo(dtype)
    part = jax.lax.reduce_precision(part, bits.nexp, bits.nmant).astype(dtype)
    for axis, names in shared:
        for name in reversed(names):
            part = jax.lax.all_gather(part, name, axis=axis, tiled=True)
    return part.astype(stored)


def _scatter(shared: tuple, dtype: jnp.dtype, stored: jnp.dtype, _, grad: Array):
    grad = grad.astype(jnp.float32)
    for axis, names in shared:
        grad = _sum_and_cut(grad, axis, names)
    return (grad.astype(stored),)


def _sum_and_cut(x: Array, axis: int, names: Sequence[str]) -> Array:
    """Add up what the devices along mesh axes have, each keeping its part of an axis."""
    x = jnp.moveaxis(x, axis, 0)
    for name in names:
        x = jax.lax.psum_scatter(x, name, tiled=True)
    return jnp.moveaxis(x, 0, axis)


_gather.defvjp(lambda part, *how: (_gather(part, *how), None), _scatter)


def sum_over(x, names: Sequence[str], mesh: Mesh | None):
    """Add up a tree of arrays over the devices along these axes."""
    names = _longer_than_one(names, mesh)
    return jax.lax.psum(x, names) if names else x


def max_over(x: Array, names: Sequence[str], mesh: Mesh | None) -> Array:
    """Return the largest over the devices along these axes."""
    names = _longer_than_one(names, mesh)
    return jax.lax.pmax(x, names) if names else x


def sum_gradient(
    grad: Array, spec: PartitionSpec, split: Sequence[AxisSplit], mesh: Mesh
) -> Array:
    """Add up a gradient over the devices that hold the same part of a parameter.

    Args:
      spec: of the parameter, and so of `grad`.
      split: of what is returned, which may be split further.
    """
    done: tuple[str, ...] = ()
    parts = (*spec, *(None,) * (grad.ndim - len(spec)))
    for axis, (part, wanted) in enumerate(zip(parts, split, strict=True)):
        held = part if isinstance(part, tuple) else (part,) if part else ()
        further = wanted.names[len(held) :]
        grad = _sum_and_cut(grad, axis, further)
        done += (*held, *further)
    return sum_over(grad, [name for name in MESH_AXES if name not in done], mesh)


def ragged_exchange(
    rows: Float[Array, "r d"], size: int, at_sender: Int[Array, "n n"],
    at_receiver: Int[Array, "n n"], counts: Int[Array, "n n"], axis: str,
) -> Float[Array, "size d"]:
    """Send stretches of rows to the devices along an axis; return what comes, 0 where nothing does.

    Args:
      size: rows that are returned.
      at_sender, at_receiver: where the stretch from each device to each other begins.
      counts: its rows. The arguments from `at_sender` on are the same on all these devices.
    """
    me = jax.lax.axis_index(axis)
    if target_platform() == CPU:
        return _exchange_by_gathering(
            rows, size, at_sender[:, me], at_receiver[:, me], counts[:, me], axis
        )
    return jax.lax.ragged_all_to_all(
        rows, jnp.zeros((size, *rows.shape[1:]), rows.dtype), at_sender[me], counts[me],
        at_receiver[me], counts[:, me], axis_name=axis,
    )


def _exchange_by_gathering(rows, size: int, at_sender, at_receiver, counts, axis: str):
    """Exchange rows where the compiler has no operation for it: take them out of everybody's."""
    place = jnp.arange(size)[:, None]
    comes = (place >= at_receiver) & (place < at_receiver + counts)
    sender = jnp.argmax(comes, axis=1)
    source = sender * rows.shape[0] + (at_sender - at_receiver)[sender] + place[:, 0]
    source = jnp.where(jnp.any(comes, axis=1), source, rows.shape[0] * counts.size)
    everything = jax.lax.all_gather(rows, axis, tiled=True)
    return jnp.take(everything, source, axis=0, mode="fill", fill_value=0)


def gather_over(x: Array, name: str, axis: int, mesh: Mesh | None) -> Array:
    """Join the parts of an axis that lie on the devices along a mesh axis."""
    if not _longer_than_one((name,), mesh):
        return x
    return jax.lax.all_gather(x, name, axis=axis, tiled=True)


def _longer_than_one(names: Sequence[str], mesh: Mesh | None) -> tuple[str, ...]:
    return () if mesh is None else tuple(name for name in names if mesh.shape[name] > 1)
