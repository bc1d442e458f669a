"""Put the tensors of a source together into the leaves of our parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dsv4_jax.arrays import BFLOAT16, contiguous, copy
from dsv4_jax.config import ModelConfig
from dsv4_jax.convert.check import check_table
from dsv4_jax.convert.source import Source, about
from dsv4_jax.convert.storage import INT32, Storage
from dsv4_jax.convert.table import INTEGER, Layout, Part, Tensor, weights_of
from dsv4_jax.quant import Block, decode


class Leaf(NamedTuple):
    """A leaf of our parameters and the tensors that fill it."""

    path: str
    shape: tuple[int, ...]
    stacked: int  # leading axes that enumerate layers and experts
    parts: list[tuple[Tensor, Part]]


def leaves_of(config: ModelConfig, tensors: tuple[Tensor, ...]) -> list[Leaf]:
    """Return every leaf of the parameters."""
    parts: dict[str, list] = {}
    for tensor in tensors:
        for part in tensor.parts:
            parts.setdefault(part.path, []).append((tensor, part))
    return [
        Leaf(path, weight.value.shape, len(parts[path][0][1].index), parts[path])
        for path, weight in weights_of(config).items()
    ]


def leaf_dtype(leaf: Leaf, storages: Mapping[str, Storage]) -> np.dtype:
    """Return the dtype of a leaf: bfloat16 of what is quantised, one that holds all of its tensors.

    Args:
      storages: of tensors, by name.
    """
    if leaf.parts[0][0].kind == INTEGER:
        return INT32
    stored = {storages[tensor.name] for tensor, _ in leaf.parts}
    return np.dtype(jnp.result_type(*{BFLOAT16 if s.form else s.dtype for s in stored}))


def read_leaf(
    source: Source, leaf: Leaf, index: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
    """Read a part of a leaf, and of its tensors no more than that.

    Args:
      index: a slice with start and stop for every axis.
    Raises:
      InputError: a value or scale is not finite, does not fit the dtype, or is no expert's id.
    """
    out = np.empty(sizes_of(index), dtype)
    for place, tensor, part in parts_in(leaf, index):
        inner = index[leaf.stacked :]
        block = source.read_part(tensor, part, inner)
        with about(source.where(tensor)):
            if tensor.kind == INTEGER:
                check_table(block.values, source.config)
            copy(_to_leaf(block, part.layout, inner, dtype), out[place])
    return out


def leaf_slice(block: Block, part: Part, dtype: np.dtype) -> np.ndarray:
    """Return what a tensor that was read whole fills of a leaf.

    Raises:
      InputError: a value or scale is not finite, or does not fit the dtype.
    """
    values = decode(block, dtype)[part.start : part.start + part.layout.shape[0]]
    return contiguous(part.layout.to_leaf(values))


def sizes_of(index: tuple[slice, ...]) -> tuple[int, ...]:
    """Return the shape of a part of a leaf."""
    return tuple(part.stop - part.start for part in index)


def parts_in(leaf: Leaf, index: tuple[slice, ...]) -> Iterator[tuple[tuple, Tensor, Part]]:
    """Yield the tensors that fill a part of a leaf, and where in that part."""
    for tensor, part in leaf.parts:
        place = tuple(i - chosen.start for i, chosen in zip(part.index, index, strict=False))
        if all(0 <= i < size for i, size in zip(place, sizes_of(index), strict=False)):
            yield place, tensor, part


def _to_leaf(
    block: Block, layout: Layout, index: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
    """Decode what `read_part` read and arrange it as the leaf has it."""
    layout, picks = layout.restrict(index)
    values = decode(block, dtype)
    if values.shape != layout.shape:
        # Whole bytes were read, and hold more columns than were asked for.
        per_byte = block.form.per_byte
        read = np.unique(picks[1] // per_byte)[:, None] * per_byte + np.arange(per_byte)
        values = values[:, np.isin(read.reshape(-1), picks[1])]
    return layout.to_leaf(values)
