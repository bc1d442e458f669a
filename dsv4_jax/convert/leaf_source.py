"""Parameters of ours as the source of a conversion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsv4_jax.arrays import FLOAT32
from dsv4_jax.config import ModelConfig
from dsv4_jax.convert.leaves import Leaf, leaves_of
from dsv4_jax.convert.quantized import Quantized
from dsv4_jax.convert.source import WHOLE, about, check_values
from dsv4_jax.convert.storage import BYTES, FORMS, PLAIN_DTYPES, Storage, stored_shapes
from dsv4_jax.convert.table import INTEGER, Part, Tensor, tensors_of
from dsv4_jax.convert.untrusted import raise_all
from dsv4_jax.errors import shown
from dsv4_jax.quant import Block, check_scales


class LeafSource:
    """Parameters of ours: arrays, quantised leaves, or what else has a shape, a dtype and items.

    Args:
      leaves: by path, as "pairs/csa/attention/w_kv".
    Raises:
      InputError: leaves are missing, unexpected, mis-shaped or mis-typed: all of them are in one
        error.
    """

    def __init__(self, config: ModelConfig, leaves: Mapping[str, Any], where: str):
        self.config, self.tensors = config, tensors_of(config)
        self._leaves, self._where = leaves, where
        self._check()

    def storage(self, tensor: Tensor) -> Storage:
        """Say how a tensor is stored, without reading it."""
        leaf = self._leaves[tensor.parts[0].path]
        if isinstance(leaf, Quantized):
            return Storage(BYTES, leaf.form, FLOAT32 if leaf.scales.dtype == FLOAT32 else BYTES)
        return Storage(np.dtype(leaf.dtype))

    def read(self, tensor: Tensor) -> Block:
        """Return a tensor as it is stored, checked.

        Raises:
          InputError: a value is not finite.
        """
        first = tensor.parts[0]
        leaf = self._leaves[first.path]
        if isinstance(leaf, Quantized):
            block = leaf.block(first.index)
        else:
            rows = [
                part.layout.to_tensor(np.asarray(self._leaves[part.path][part.index]))
                for part in tensor.parts
            ]
            block = Block(rows[0] if len(rows) == 1 else np.concatenate(rows))
        with about(self.where(tensor)):
            check_values(block, tensor, self.config)
        return block

    def read_scales(self, tensor: Tensor, index: tuple[slice, slice] = WHOLE) -> np.ndarray:
        """Return scales of a quantised tensor, checked.

        Raises:
          InputError: a scale is not finite.
        """
        first = tensor.parts[0]
        scales = self._leaves[first.path].stored_scales(first.index)[index]
        with about(self.where(tensor)):
            check_scales(scales)
        return scales

    def read_part(self, tensor: Tensor, part: Part, index: tuple[slice, ...]) -> Block:
        """Return those values of a tensor that belong to a part of a leaf's slice, unchecked."""
        layout, _ = part.layout.restrict(index)
        values = np.asarray(self._leaves[part.path][(*part.index, *index)])
        return Block(layout.to_tensor(values))

    def where(self, tensor: Tensor) -> str:
        """Return the leaf of a tensor, for messages."""
        return f"{self._where}: {tensor.parts[0].path}"

    def _check(self) -> None:
        problems, expected = [], {leaf.path: leaf for leaf in leaves_of(self.config, self.tensors)}
        for path, leaf in expected.items():
            problems += [f"{path}: {fault}" for fault in _faults(leaf, self._leaves.get(path))]
        problems += [
            f"{shown(path)}: unexpected" for path in self._leaves.keys() - expected.keys()
        ]
        raise_all(Path(self._where), problems)


def _faults(expected: Leaf, found: Any) -> Iterator[str]:
    """Say what is wrong with a leaf."""
    if found is None:
        yield "missing"
        return
    tensor, _ = expected.parts[0]
    admitted, form = ("int32", "int64") if tensor.kind == INTEGER else tuple(PLAIN_DTYPES), None
    dtype = str(getattr(found, "dtype", type(found).__name__))
    if isinstance(found, Quantized):
        form, dtype = found.form, found.form.name
        admitted = (*(known.name for known in FORMS.get(tensor.kind, ())), *admitted)
    if dtype not in admitted:
        yield f"expected {' or '.join(admitted)}, got {dtype}"
        return
    stack = expected.shape[: expected.stacked]
    shapes, arrays = [expected.shape], {"": found}
    if form:
        shapes = [(*stack, *shape) for shape in stored_shapes(tensor.shape, form)]
        arrays = {"codes ": found.codes, "scales ": found.scales}
    for (name, array), shape in zip(arrays.items(), shapes, strict=True):
        if tuple(array.shape) != shape:
            yield f"expected {name}shape {list(shape)}, got {list(array.shape)}"
