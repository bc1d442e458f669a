"""Save parameters, or the tensors of a checkpoint, as a checkpoint for PyTorch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

from dsv4_jax.arrays import FLOAT32
from dsv4_jax.config import ModelConfig
from dsv4_jax.convert.leaf_source import LeafSource
from dsv4_jax.convert.names import (
    HF,
    HF_APART,
    ORIGINAL,
    FileTensor,
    Naming,
    file_tensors,
    scale_name,
)
from dsv4_jax.convert.output import Output
from dsv4_jax.convert.shards import Item, write_shards
from dsv4_jax.convert.source import Source, about, targets_of
from dsv4_jax.convert.storage import Storage, dtype_name, restore, stored_shapes, written_dtypes
from dsv4_jax.convert.table import EXPERT, LINEAR, Tensor
from dsv4_jax.errors import InputError, shown
from dsv4_jax.hf_storage import StorageKeys
from dsv4_jax.hf_write import NOTHING, deepseek_config, inference_config, transformers_config
from dsv4_jax.quant import Block

HF_FORMAT, DEEPSEEK = "hf", "deepseek"
FORMATS = (HF_FORMAT, DEEPSEEK)
MAX_SHARD_BYTES = 5 * 10**9

Seen = Callable[[Tensor, Block], None]  # a tensor as it is written


def save_pretrained(
    path: str | os.PathLike, config: ModelConfig, params: dict, *, format: str = HF_FORMAT,
    dtype: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that PyTorch programs load: `config.json` and safetensors files.

    The folder appears only when it is complete. Tensors pass through memory one at a time.

    Args:
      path: a folder that does not exist yet, or is empty.
      params: of `Transformer(config)`, wholly addressable from this process; leaves may be
        `Quantized`.
      format: "hf", with the names of transformers' modules, or "deepseek", with the original names.
        The multi-token prediction block, which transformers ignores, has original names in both.
      dtype: None keeps each leaf's own. "bfloat16", "float16" or "float32", or such a dtype itself,
        is that of all weights but those that the released checkpoints keep in float32. "fp8" stores
        the released checkpoints' quantised matrices in FP8, "fp4" those of the routed experts in
        FP4.
      max_shard_bytes: of one file, unless a single tensor is larger.
    Raises:
      InputError: the folder exists or cannot be written, parameters are not those of the config or
        not finite, or the format cannot say this config.
    """
    if format not in FORMATS:
        raise InputError(f"format: expected one of {', '.join(FORMATS)}, got {shown(format)}")
    check_shard_bytes(max_shard_bytes)
    if not isinstance(params, Mapping):
        raise InputError(f"params: expected a tree of arrays, got {type(params).__name__}")
    source = LeafSource(config, flatten_dict(params, sep="/"), "params")
    targets = targets_of(source, dtype_name(dtype))
    documents = config_documents(config, storage_keys(source, targets), format)
    items = items_of(source, format, targets)
    with Output(Path(path)) as output:
        write_shards(output, items, max_shard_bytes=max_shard_bytes)
        for name, document in documents.items():
            output.write_json(name, document)


def check_shard_bytes(max_shard_bytes: int) -> None:
    """Raise an InputError unless it is a number of bytes."""
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise InputError(
            f"max_shard_bytes: expected a whole number above 0, got {shown(max_shard_bytes)}"
        )


def config_documents(
    config: ModelConfig, keys: StorageKeys, format: str, carried: Mapping = NOTHING
) -> dict[str, dict]:
    """Return the configuration files of a format, by name.

    Args:
      carried: the `config.json` that came with the input.
    Raises:
      InputError: the format cannot say this config; `inference/config.json`, for DeepSeek's own
        program, which knows fewer models and dtypes, is then left out.
    """
    if format == HF_FORMAT:
        return {"config.json": transformers_config(config, keys, carried)}
    documents = {"config.json": deepseek_config(config, keys, carried)}
    with contextlib.suppress(InputError):
        documents["inference/config.json"] = inference_config(config, keys)
    return documents


def storage_keys(source: Source, targets: Mapping[str, Storage]) -> StorageKeys:
    """Describe what is written as far as `config.json` says it.

    Args:
      targets: how tensors are written, by name.
    Raises:
      InputError: matrices of one kind are stored in several ways.
    """
    forms: dict[str, set] = {EXPERT: set(), LINEAR: set()}
    for tensor in source.tensors:
        if tensor.kind in forms:
            target = targets[tensor.name]
            forms[tensor.kind].add((target.form and target.form.name, target.scales))
    for kind, found in forms.items():
        if len(found) > 1:
            raise InputError(
                f"{kind} matrices: expected all in one format, for config.json has words for one, "
                f"got {sorted(str(name) for name, _ in found)}; give a dtype"
            )
    (experts, expert_scales), = forms[EXPERT]
    (linears, linear_scales), = forms[LINEAR]
    scales = {expert_scales, linear_scales}
    return StorageKeys(
        dtype=targets["head.weight"].dtype.name,
        experts=experts,
        linears=linears,
        scales="float32" if FLOAT32 in scales else "ue8m0",
    )


def items_of(
    source: Source, format: str, targets: Mapping[str, Storage], seen: Seen = lambda *_: None
) -> list[Item]:
    """Return what is to be written, in the order of the released checkpoints.

    Args:
      targets: how tensors are written, by name.
      seen: is told every tensor when its values are written.
    Raises:
      InputError: tensors that become one are stored differently.
    """
    naming = _naming(source, format, targets)
    stored = _Stored(source, targets, seen)
    return [
        item for file in file_tensors(naming, source.tensors)
        for item in _items(stored, naming, file)
    ]  # fmt: skip


def _naming(source: Source, format: str, targets: Mapping[str, Storage]) -> Naming:
    if format == DEEPSEEK:
        return ORIGINAL
    expert = next(tensor for tensor in source.tensors if tensor.kind == EXPERT)
    return HF_APART if targets[expert.name].form else HF


class _Stored:
    """Tensors as they are to be written; the last one is kept, for its scales follow its values."""

    def __init__(self, source: Source, targets: Mapping[str, Storage], seen: Seen):
        self.targets, self._source, self._seen = targets, source, seen
        self._last: tuple[Tensor, Block] | None = None

    def _block(self, tensor: Tensor) -> Block:
        if self._last is None or self._last[0] is not tensor:
            self._last = None  # before the next is read: one at a time is in memory
            before = self._source.read(tensor)
            with about(self._source.where(tensor)):
                self._last = tensor, restore(before, self.targets[tensor.name])
        return self._last[1]

    def values(self, tensors: tuple[Tensor, ...]) -> Iterator[np.ndarray]:
        for tensor in tensors:
            self._seen(tensor, self._block(tensor))
            yield self._block(tensor).values

    def scales(self, tensors: tuple[Tensor, ...]) -> Iterator[np.ndarray]:
        for tensor in tensors:
            if self.targets[tensor.name].scales == FLOAT32:
                # They stand before all values of their file, and are never made here.
                yield self._source.read_scales(tensor)
            else:
                yield self._block(tensor).scales


def _items(stored: _Stored, naming: Naming, file: FileTensor) -> Iterator[Item]:
    """Yield a tensor to be written and, where it is quantised, its scales."""
    targets = {stored.targets[tensor.name] for tensor in file.tensors}
    if len(targets) > 1:
        raise InputError(
            f"{file.name}: expected its experts stored alike, got several ways; give a dtype"
        )
    (target,) = targets
    names = file.name, scale_name(file.name, naming.scale_suffix)
    dtypes, shapes = written_dtypes(target), stored_shapes(file.tensors[0].shape, target.form)
    for name, dtype, shape, pieces in zip(
        names, dtypes, shapes, (stored.values, stored.scales), strict=False
    ):
        yield Item(name, dtype, file.shape(shape), partial(pieces, file.tensors))
