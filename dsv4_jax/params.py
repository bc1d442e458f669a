"""Declare weights: one line gives a weight its name, axes, shape and initialisation."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding

from dsv4_jax.collectives import gather_weight
from dsv4_jax.errors import InputError
from dsv4_jax.sharding import (
    KEPT,
    MESH_AXES,
    POD,
    AnyMesh,
    AxisSplit,
    check_divides,
    parts_of,
    spec_of,
    split_of,
    spread,
)

BATCH, IN, OUT, NONE = "batch", "in", "out", "none"

# Leaves that no gradient reaches: the bias update and the hash table set them.
FROZEN_NAMES = frozenset({"selection_bias", "hash_table"})


Init = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]  # of key, shape and dtype


class Weight(struct.PyTreeNode, nn.meta.AxisMetadata):
    """A parameter with the names and kinds of its axes and its initialisation.

    A matrix maps its "in" axes to its "out" axes; its "batch" axes enumerate independent
    matrices (experts, output groups, stacked layers). The axes of vectors, biases and tables are
    "none". Sharding reads the names; Muon and weight decay read the kinds.
    """

    value: Any
    axes: tuple[str, ...] = struct.field(pytree_node=False)
    kinds: tuple[str, ...] = struct.field(pytree_node=False)
    init: Init = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, value: Any) -> Weight:
        return self.replace(value=value)

    def add_axis(self, index: int, params: dict) -> Weight:
        """Record the axis that `nn.scan` stacks layers on."""
        return self._edit(lambda names: names.insert(index, "layers"),
                          lambda kinds: kinds.insert(index, BATCH))

    def remove_axis(self, index: int, params: dict) -> Weight:
        return self._edit(lambda names: names.pop(index), lambda kinds: kinds.pop(index))

    def _edit(self, edit_axes, edit_kinds) -> Weight:
        axes, kinds = list(self.axes), list(self.kinds)
        edit_axes(axes)
        edit_kinds(kinds)
        return self.replace(axes=tuple(axes), kinds=tuple(kinds))


def parse_axes(signature: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Read "batch | in -> out" into axis names and their kinds; without "->" all are "none"."""
    head, arrow, out = signature.partition("->")
    batch, bar, inner = head.partition("|")
    if not bar:
        batch, inner = "", head
    if not arrow:
        return tuple(inner.split()), (NONE,) * len(inner.split())
    groups = ((BATCH, batch.split()), (IN, inner.split()), (OUT, out.split()))
    return (
        tuple(name for _, names in groups for name in names),
        tuple(kind for kind, names in groups for _ in names),
    )


def param(
    module: nn.Module, name: str, signature: str, shape: tuple[int, ...], init: Init | None = None,
    *, exact: bool = False,
):
    """Declare a weight of a module, float32 unless its init says otherwise; return its value.

    On a mesh that is the part which a device uses, gathered from those who share it.

    Args:
      signature: axis names as "batch | in -> out" for matrices, or plain names for the rest.
      init: gives every stacked layer the same treatment, whatever axes lead the shape; the
        default is normal with the standard deviation `config.initializer_range`.
      exact: it is used in float32, whatever the dtype of activations.
    """
    axes, kinds = parse_axes(signature)
    assert len(axes) == len(shape), f"{name}: axes {axes} do not fit shape {shape}"
    init = normal(module.config.initializer_range) if init is None else init
    mesh, split = module.runtime.mesh, None
    if mesh is not None:
        split = split_of(axes, shape, mesh, module.runtime.layout, matrix=IN in kinds)
        sizes = zip(shape, split, strict=True)
        shape = tuple(size // parts_of(part.names, mesh) for size, part in sizes)
    value = module.param(
        name, lambda key: Weight(init(key, shape, jnp.float32), axes, kinds, init)
    )
    if split is None or not any(part.shared for part in split):
        return value
    dtype = jnp.dtype(jnp.float32) if exact else module.runtime.compute_dtype
    return gather_weight(value, split, dtype)


def weight_split(weight: Weight, mesh: AnyMesh, layout: str = POD) -> tuple[AxisSplit, ...]:
    """Return how each axis of a weight is split."""
    return split_of(weight.axes, weight.value.shape, mesh, layout, matrix=IN in weight.kinds)


def moment_split(weight: Weight, mesh: AnyMesh, layout: str = POD) -> tuple[AxisSplit, ...]:
    """Return how an optimizer's moments of a weight are split.

    Those of matrices over all devices: by whole ones as far as that goes, then wherever it does.
    """
    split = weight_split(weight, mesh, layout)
    if IN not in weight.kinds:
        return split
    whole_first = sorted(range(len(split)), key=lambda axis: weight.kinds[axis] != BATCH)
    return spread(split, weight.value.shape, whole_first, mesh)


def shardings_of(boxed_params, mesh: AnyMesh, layout: str = POD):
    """Return the tree of shardings of a tree of `Weight`s (arrays or their shapes).

    Raises:
      InputError: the mesh has not the axes of `MESH_AXES`, or one does not divide an axis that it
        is to split for use; names both.
    """
    if set(mesh.axis_names) != set(MESH_AXES):
        found = ", ".join(map(str, mesh.axis_names))
        raise InputError(f"mesh: expected axes {', '.join(MESH_AXES)}, got {found}; use make_mesh")

    def sharding(path, weight: Weight) -> NamedSharding:
        for axis, size in zip(weight.axes, weight.value.shape, strict=True):
            if axis in KEPT:
                check_divides(mesh, (KEPT[axis],), axis, size, path_name(path))
        return NamedSharding(mesh, spec_of(weight_split(weight, mesh, layout)))

    return jax.tree_util.tree_map_with_path(sharding, boxed_params, is_leaf=_is_weight)


# One object per value, so that equal initialisations share a compiled function.
normal = functools.cache(nn.initializers.normal)
constant = functools.cache(nn.initializers.constant)


def draw(key: jax.Array, init: Init, shape: tuple[int, ...], sharding=None) -> jax.Array:
    """Initialise one weight; with a sharding each device makes only its own part."""
    return _compiled_draw()(key, init, shape, sharding)


@functools.cache
def _compiled_draw() -> Callable:
    def value(key, init, shape, sharding):
        x = init(key, shape, jnp.float32)
        return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)

    # A model has dozens of shapes, each compiled to run once: on CPU, optimising the random
    # number generator takes 0.3 s a shape and saves milliseconds.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(value, static_argnames=("init", "shape", "sharding"), compiler_options=options)


def key_of(key: jax.Array, path: tuple[str, ...]) -> jax.Array:
    """Return the random key of a weight: it depends on its path alone, not on other weights."""
    return jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))


def path_name(path: tuple) -> str:
    """Write a tree path as "block/attention/w_kv"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def kinds_of(boxed_params) -> dict:
    """Return the tree of axis kinds of a tree of `Weight`s."""
    return jax.tree.map(lambda w: w.kinds, boxed_params, is_leaf=_is_weight)


def split_trainable(params: dict) -> tuple[dict, dict]:
    """Split parameters into (trainable, frozen) trees; `merge` joins them again.

    Frozen are the router's selection bias, which the load update moves, and the hash-routing
    table, which never changes.
    """
    flat = flatten_dict(params)
    frozen = {path: leaf for path, leaf in flat.items() if path[-1] in FROZEN_NAMES}
    trainable = {path: leaf for path, leaf in flat.items() if path not in frozen}
    return unflatten_dict(trainable), unflatten_dict(frozen)


def merge(trainable: dict, frozen: dict) -> dict:
    """Join the two trees of `split_trainable`."""
    return unflatten_dict({**flatten_dict(trainable), **flatten_dict(frozen)})


def _is_weight(leaf) -> bool:
    return isinstance(leaf, Weight)
