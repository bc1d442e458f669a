"""Load a checkpoint into our tree of parameters."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from dsv4_jax.config import ModelConfig
from dsv4_jax.convert.leaves import Leaf, leaf_dtype, leaves_of, parts_in, read_leaf, sizes_of
from dsv4_jax.convert.opening import open_checkpoint
from dsv4_jax.convert.quantized import Quantized, code_dtypes
from dsv4_jax.convert.source import FileSource
from dsv4_jax.convert.storage import PLAIN_DTYPES, Storage, dtype_name, stored_shapes
from dsv4_jax.convert.table import weights_of
from dsv4_jax.errors import InputError
from dsv4_jax.params import shardings_of
from dsv4_jax.sharding import POD
from dsv4_jax.terminal import say


def load_pretrained(
    path: str | os.PathLike, *, dtype: jnp.dtype | str | None = None, mesh: Mesh | None = None,
    layout: str = POD, keep_quantized: bool = False, skip_mtp: bool = False,
) -> tuple[ModelConfig, dict]:
    """Load a checkpoint of DeepSeek-V4: safetensors in any naming and format, or ours.

    Every tensor must be there, once, with its shape and a dtype that the architecture admits, and
    every value must be finite.

    Args:
      path: a folder with `config.json` and safetensors files, of DeepSeek or of transformers; what
        `launch/convert.py --to=orbax` wrote; or the workdir of a training, whose newest checkpoint
        is taken.
      dtype: of all floating-point leaves. None: quantised tensors become bfloat16, everything else
        keeps its stored type.
      mesh: devices that share the parameters; each process reads the bytes of its own shards alone.
        None: the default device.
      layout: how they share them: one of `sharding.LAYOUTS`.
      keep_quantized: leave quantised weights as `Quantized` leaves, which hold the stored bytes;
        `dequantize` makes weights of them, `save_pretrained` writes the same bytes again.
      skip_mtp: leave out the multi-token prediction block, of whatever kind.
    Returns:
      The configuration, without a prediction block if transformers has dropped it, and parameters
      for `Transformer(config)`.
    Raises:
      InputError: one line with the path, the tensor and the reason.
    """
    name = dtype_name(dtype, PLAIN_DTYPES)
    opened = open_checkpoint(Path(path), skip_mtp=skip_mtp)
    say(f"{path}: {opened.title}")
    source = opened.source
    shardings = _shardings(source.config, mesh, layout)
    stored = {tensor.name: source.storage(tensor) for tensor in source.tensors}
    wanted = stored if name is None else dict.fromkeys(stored, Storage(PLAIN_DTYPES[name]))
    params = {}
    for leaf in leaves_of(source.config, source.tensors):
        sharding = shardings[leaf.path]
        if keep_quantized and _is_quantized(leaf, stored):
            params[leaf.path] = _load_quantized(source, leaf, sharding)
        else:
            read = partial(read_leaf, source, leaf, dtype=leaf_dtype(leaf, wanted))
            params[leaf.path] = _assemble(leaf.shape, sharding, read)
    return source.config, unflatten_dict(params, sep="/")


def _shardings(config: ModelConfig, mesh: Mesh | None, layout: str) -> dict[str, Sharding]:
    weights = weights_of(config)
    if mesh is None:
        return dict.fromkeys(weights, jnp.zeros(()).sharding)  # of the default device
    return flatten_dict(shardings_of(unflatten_dict(weights, sep="/"), mesh, layout), sep="/")


def _is_quantized(leaf: Leaf, storages: dict[str, Storage]) -> bool:
    stored = {storages[tensor.name] for tensor, _ in leaf.parts}
    if len(stored) > 1 and any(storage.form for storage in stored):
        raise InputError(
            f"{leaf.path}: expected all of its tensors in one format, got several; load without "
            "keep_quantized"
        )
    return next(iter(stored)).form is not None


def _load_quantized(source: FileSource, leaf: Leaf, sharding: Sharding) -> Quantized:
    """Fill the codes and scales of a leaf, which keep the checkpoint's axes."""
    tensor, part = leaf.parts[0]
    storage = source.storage(tensor)
    dtypes = code_dtypes(storage.form, storage.scales)
    stack = leaf.shape[: leaf.stacked]

    def read_codes(index: tuple[slice, ...]) -> np.ndarray:
        out = np.empty(sizes_of(index), np.uint8)
        for place, tensor, _ in parts_in(leaf, index):
            out[place] = source.read_codes(tensor, index[leaf.stacked :])
        return out.view(dtypes[0])

    def read_scales(index: tuple[slice, ...]) -> np.ndarray:
        out = np.empty(sizes_of(index), storage.scales)
        for place, tensor, _ in parts_in(leaf, index):
            out[place] = source.read_scales(tensor, index[leaf.stacked :])
        return out.view(dtypes[1])

    arrays = []
    shapes = stored_shapes(tensor.shape, storage.form)
    for shape, read in zip(shapes, (read_codes, read_scales), strict=True):
        placed = _stored_sharding(sharding, leaf, (*stack, *shape))
        arrays.append(_assemble((*stack, *shape), placed, read))
    return Quantized(*arrays, storage.form, part.layout)


def _stored_sharding(sharding: Sharding, leaf: Leaf, shape: tuple[int, ...]) -> Sharding:
    """Shard codes or scales like the weight, by the first of the axes merged into each of theirs.

    An axis that does not divide, such as one of few scales, is whole on every device.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    layout = leaf.parts[0][1].layout
    of_axis = dict(zip(layout.names, sharding.spec[leaf.stacked :], strict=True))
    spec = [*sharding.spec[: leaf.stacked], *(of_axis[axis[0]] for axis in layout.axes)]
    for axis, size in enumerate(shape):
        names = (spec[axis],) if isinstance(spec[axis], str) else spec[axis] or ()
        if size % math.prod(sharding.mesh.shape[name] for name in names):
            spec[axis] = None
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _assemble(
    shape: tuple[int, ...], sharding: Sharding, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """Make an array of which each device gets its own part; equal parts are read once."""
    devices: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, holders in devices.items():
        values = read(tuple(slice(*pair) for pair in bounds))
        arrays += [jax.device_put(values, device) for device in holders]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)
