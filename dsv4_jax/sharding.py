"""Place arrays on a mesh of devices: one table from the names of axes to the mesh."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dsv4_jax.errors import InputError
from dsv4_jax.params import Weight, path_name

MESH_AXES = ("data", "fsdp", "expert", "tensor")
# Rows of a batch are spread over every axis but "tensor", so that the same devices that hold
# different experts also work on different tokens.
BATCH_AXES = ("data", "fsdp", "expert")

# Logical axis -> mesh axes. An axis that is not listed is whole on every device.
RULES = {
    "batch": BATCH_AXES,
    "width": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "groups": ("tensor",),
    "index_heads": ("tensor",),
    "experts": ("expert",),
    "expert_width": ("tensor",),
}


def make_mesh(sizes: Sequence[int]) -> Mesh:
    """Arrange the first devices in a mesh with the given sizes of `MESH_AXES`.

    Raises:
      InputError: the product of the sizes does not divide the number of devices.
    """
    devices, count = jax.devices(), math.prod(sizes)
    if len(devices) % count:
        product = " x ".join(f"{axis} {n}" for axis, n in zip(MESH_AXES, sizes, strict=True))
        raise InputError(
            f"mesh: expected a product of sizes that divides the {len(devices)} devices, got "
            f"{product} = {count}; change the mesh section of the config"
        )
    auto = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(tuple(sizes), MESH_AXES, auto, devices=devices[:count])


def spec_of(axes: tuple[str, ...]) -> PartitionSpec:
    """Return the partition of an array with these logical axes."""
    return PartitionSpec(*(RULES.get(axis) for axis in axes))


def constrain(x: jax.Array, axes: str, mesh: Mesh | None) -> jax.Array:
    """Fix the placement of an activation, given its logical axes separated by blanks."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec_of(tuple(axes.split()))))


def shardings_of(boxed_params, mesh: Mesh):
    """Return the tree of shardings of a tree of `Weight`s (arrays or their shapes).

    Raises:
      InputError: the mesh has not the axes of `MESH_AXES`, or one does not divide an axis that it
        is to split; names both.
    """
    if set(mesh.axis_names) != set(MESH_AXES):
        found = ", ".join(map(str, mesh.axis_names))
        raise InputError(f"mesh: expected axes {', '.join(MESH_AXES)}, got {found}; use make_mesh")

    def sharding(path, weight: Weight) -> NamedSharding:
        for axis, size in zip(weight.axes, weight.value.shape, strict=True):
            check_divides(mesh, axis, size, path_name(path))
        return NamedSharding(mesh, spec_of(weight.axes))

    return jax.tree_util.tree_map_with_path(
        sharding, boxed_params, is_leaf=lambda leaf: isinstance(leaf, Weight)
    )


def check_divides(mesh: Mesh, axis: str, size: int, where: str) -> None:
    """Raise an InputError unless the mesh axes of a logical axis divide its size."""
    mesh_axes = RULES.get(axis, ())
    parts = math.prod(mesh.shape[name] for name in mesh_axes)
    if size % parts:
        raise InputError(
            f"mesh: {' x '.join(mesh_axes)} = {parts} devices do not divide axis {axis!r} of size "
            f"{size} of {where}; choose a divisor of {size}"
        )


def batch_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Return the placement of a batch of this many rows: split over all axes but "tensor"."""
    check_divides(mesh, "batch", rows, "the batch")
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the placement that holds an array whole on every device."""
    return NamedSharding(mesh, PartitionSpec())

