"""Parameters of ours as the source of a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsv4_jax.config import ModelConfig
from dsv4_jax.convert.quantized import Quantized
from dsv4_jax.convert.source import about, check_values
from dsv4_jax.convert.storage import BYTES, Storage
from dsv4_jax.convert.table import Part, Tensor, tensors_of
from dsv4_jax.convert.tensor_files import raise_all
from dsv4_jax.quant import FLOAT32, Block


class LeafSource:
    """Parameters of ours: arrays, quantised leaves, or what else has a shape, a dtype and items.

    Args:
      leaves: by path, as "pairs/csa/attention/w_kv".
    Raises:
      InputError: leaves are missing, unexpected or mis-shaped: all of them are in one error.
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

    def read_part(self, tensor: Tensor, part: Part, index: tuple[slice, ...]) -> Block:
        """Return those values of a tensor that belong to a part of a leaf's slice, unchecked."""
        layout, _ = part.layout.restrict(index)
        values = np.asarray(self._leaves[part.path][(*part.index, *index)])
        return Block(layout.to_tensor(values))

    def where(self, tensor: Tensor) -> str:
        """Return the leaf of a tensor, for messages."""
        return f"{self._where}: {tensor.parts[0].path}"

    def _check(self) -> None:
        problems, expected = [], {}
        for tensor in self.tensors:
            for part in tensor.parts:
                stack = expected.setdefault(part.path, (part.layout.sizes, []))[1]
                stack.append(part.index)
        for path, (sizes, indices) in expected.items():
            if path not in self._leaves:
                problems.append(f"{path}: missing")
                continue
            shape = tuple(max(index[axis] for index in indices) + 1 for axis in
                          range(len(indices[0]))) + sizes  # fmt: skip
            found = tuple(self._leaves[path].shape)
            if found != shape:
                problems.append(f"{path}: expected shape {list(shape)}, got {list(found)}")
        problems += [f"{path}: unexpected" for path in self._leaves.keys() - expected.keys()]
        raise_all(Path(self._where), problems)
