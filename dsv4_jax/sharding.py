"""Place arrays on a mesh of devices.

A weight is split in two ways. By the axes of `KEPT` a device holds the experts and heads that it
computes; nobody gathers those. What is left is split further to save memory, and gathered for use:
`LAYOUTS` says over which devices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dsv4_jax.errors import InputError

# From the outermost to the innermost: of GPUs, those of a host are along the last ones.
MESH_AXES = ("data", "expert", "fsdp", "tensor")
# Rows of a batch are spread over every axis but "tensor", so that the same devices that hold
# different experts also work on different tokens.
BATCH_AXES = ("data", "expert", "fsdp")

AnyMesh = Mesh | AbstractMesh  # of devices, or of none where only placement is asked for

# Logical axis -> the mesh axis over which it is split, in use too.
KEPT = {"experts": "expert", "heads": "tensor", "groups": "tensor", "expert_width": "tensor"}

# Layout -> the mesh axes that share the other weights, and, beside "expert", the experts.
LAYOUTS = {
    # One network joins all devices well, as in a TPU pod: everything is shared by all.
    "pod": {"dense": ("expert", "fsdp", "tensor"), "experts": ("fsdp",)},
    # It is fast within hosts alone, as between GPUs, which "fsdp" and "tensor" should then be:
    # there dense weights are gathered often; experts, of which most are elsewhere, travel little.
    "cluster": {"dense": ("fsdp", "tensor"), "experts": ("fsdp",)},
}
POD = "pod"

# A mesh axis splits the first of these that it divides. Experts first: as long as every one is
# whole, Muon needs nothing of other devices.
SHARED = ("experts", "width", "rank", "out_rank")


def product_of(sizes: Mapping[str, int]) -> str:
    """Write the sizes of a mesh as "data 2 x expert 4 = 8"."""
    product = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    return f"{product} = {math.prod(sizes.values())}"


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange devices in a mesh: neighbours along its axes are neighbours in their network.

    Args:
      sizes: devices along each of `MESH_AXES`; those that are not named have 1.
      devices: of which as many as are needed are used, from the first; None: all there are. If they
        are in several slices, these are along "data".
    Raises:
      InputError: the product of the sizes does not divide the number of devices, or slices would
        not be along "data".
    """
    devices = jax.devices() if devices is None else devices
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    count = math.prod(shape)
    if len(devices) % count:
        product = product_of(dict(zip(MESH_AXES, shape, strict=True)))
        raise InputError(
            f"mesh: expected a product of sizes that divides the {len(devices)} devices, got "
            f"{product}; change the mesh section of the config"
        )
    devices = devices[:count]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    data, *others = shape
    if data % slices:
        raise InputError(
            f"mesh.data: expected a multiple of the {slices} slices that {count} devices are in, "
            f"got {data}; only rows and the optimizer's state are shared between slices"
        )
    # An axis may be a part of one of the network's, which is no torus then.
    if slices > 1:
        placed = mesh_utils.create_hybrid_device_mesh(
            (data // slices, *others), (slices, *(1 for _ in others)), devices,
            allow_split_physical_axes=True,
        )
    else:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


class AxisSplit(NamedTuple):
    """The mesh axes that split an axis of a weight, `kept` outside of `shared`."""

    kept: tuple[str, ...] = ()  # in use, too
    shared: tuple[str, ...] = ()  # gathered for use

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, the outermost first."""
        return self.kept + self.shared


def split_of(
    axes: Sequence[str], shape: Sequence[int], mesh: AnyMesh, layout: str, *, matrix: bool
) -> tuple[AxisSplit, ...]:
    """Return how each axis of a weight is split.

    A mesh axis that divides none of the weight's `SHARED` axes does not split it. What is no
    matrix is whole but for `KEPT`: gathering it would take longer than its memory is worth.
    """
    kept = [(KEPT[axis],) if axis in KEPT else () for axis in axes]
    split = [AxisSplit(names if parts_of(names, mesh) > 1 else ()) for names in kept]
    if not matrix:
        return tuple(split)
    shared_by = LAYOUTS[layout]["experts" if "experts" in axes else "dense"]
    places = [axes.index(axis) for axis in SHARED if axis in axes]
    return spread(split, shape, places, mesh, shared_by)


def spread(
    split: Sequence[AxisSplit], shape: Sequence[int], places: Sequence[int], mesh: AnyMesh,
    names: Sequence[str] = MESH_AXES,
) -> tuple[AxisSplit, ...]:
    """Split an array further, over those of these mesh axes that do not split it yet.

    Each takes the first of the places, which are axes of the array, that it divides.
    """
    split = list(split)
    for name in names:
        if mesh.shape[name] == 1 or any(name in part.names for part in split):
            continue
        for place in places:
            part = split[place]._replace(shared=(*split[place].shared, name))
            if shape[place] % parts_of(part.names, mesh) == 0:
                split[place] = part
                break
    return tuple(split)


def parts_of(names: Sequence[str], mesh: AnyMesh) -> int:
    """Return into how many parts these mesh axes split an axis."""
    return math.prod(mesh.shape[name] for name in names)


def spec_of(split: Sequence[AxisSplit]) -> PartitionSpec:
    """Return what `split_of` says as a partition."""
    return PartitionSpec(*(part.names or None for part in split))


def check_divides(mesh: AnyMesh, names: Sequence[str], axis: str, size: int, where: str) -> None:
    """Raise an InputError unless these mesh axes divide the size of an axis."""
    parts = parts_of(names, mesh)
    if size % parts:
        raise InputError(
            f"mesh: {' x '.join(names)} = {parts} devices do not divide axis {axis!r} of size "
            f"{size} of {where}; choose a divisor of {size}"
        )


def batch_sharding(mesh: AnyMesh, rows: int) -> NamedSharding:
    """Return the placement of a batch of this many rows: split over all axes but "tensor"."""
    check_divides(mesh, BATCH_AXES, "batch", rows, "the batch")
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Return the placement that holds an array whole on every device."""
    return NamedSharding(mesh, PartitionSpec())
