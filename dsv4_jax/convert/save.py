"""Save parameters, or the tensors of a checkpoint, as a checkpoint for PyTorch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

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
from dsv4_jax.convert.shards import Item, Output, write_shards
from dsv4_jax.convert.source import Source, about
from dsv4_jax.convert.storage import (
    Storage,
    check_dtype,
    restore,
    stored_shapes,
    target_storage,
    written_dtypes,
)
from dsv4_jax.convert.table import EXPERT, LINEAR, Tensor
from dsv4_jax.errors import InputError
from dsv4_jax.hf_write import Storage as StorageKeys
from dsv4_jax.hf_write import deepseek_config, inference_config, transformers_config
from dsv4_jax.quant import FLOAT32, Block

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
      dtype: None keeps each leaf's own. "bfloat16", "float16" or "float32" is that of all weights
        but those that the released checkpoints keep in float32. "fp8" stores the released
        checkpoints' quantised matrices in FP8, "fp4" those of the routed experts in FP4.
      max_shard_bytes: of one file, unless a single tensor is larger.
    Raises:
      InputError: the folder exists or cannot be written, parameters are not those of the config or
        not finite, or the format cannot say this config.
    """
    check_format(format, dtype)
    source = LeafSource(config, flatten_dict(params, sep="/"), "params")
    keys = storage_keys(source, dtype)
    output = Output(Path(path))
    try:
        write_shards(output, items_of(source, format, dtype), max_shard_bytes=max_shard_bytes)
        write_config(output, config, keys, format, {})
        output.finish()
    except BaseException:
        output.discard()
        raise


def check_format(format: str, dtype: str | None) -> None:
    """Raise an InputError unless both are known."""
    if format not in FORMATS:
        raise InputError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    check_dtype(dtype)


def write_config(
    output: Output, config: ModelConfig, keys: StorageKeys, format: str, carried: dict
) -> None:
    """Write the configuration files of a format; `inference/config.json` where it can say all.

    Args:
      carried: the `config.json` that came with the input.
    """
    write = {HF_FORMAT: transformers_config, DEEPSEEK: deepseek_config}[format]
    output.write_json("config.json", write(config, keys, carried))
    if format == DEEPSEEK:
        # DeepSeek's inference program knows fewer models and dtypes than config.json can say.
        document = None
        with contextlib.suppress(InputError):
            document = inference_config(config, keys)
        if document is not None:
            output.write_json("inference/config.json", document)


def storage_keys(source: Source, dtype: str | None) -> StorageKeys:
    """Describe what is written as far as `config.json` says it.

    Raises:
      InputError: matrices of one kind are stored in several ways.
    """
    forms: dict[str, set] = {EXPERT: set(), LINEAR: set()}
    for tensor in source.tensors:
        if tensor.kind in forms:
            target = target_storage(tensor, source.storage(tensor), dtype)
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
    plain = next(t for t in source.tensors if t.name == "head.weight")
    return StorageKeys(
        dtype=target_storage(plain, source.storage(plain), dtype).dtype.name,
        experts=experts,
        linears=linears,
        scales="float32" if FLOAT32 in scales else "ue8m0",
    )


def items_of(
    source: Source, format: str, dtype: str | None, seen: Seen = lambda *_: None
) -> list[Item]:
    """Return what is to be written, in the order of the released checkpoints.

    Args:
      seen: is told every tensor when its values are written.
    Raises:
      InputError: tensors that become one are stored differently.
    """
    naming = _naming(source, format, dtype)
    stored = _Stored(source, dtype, seen)
    return [
        item for file in file_tensors(naming, source.tensors)
        for item in _items(stored, naming, file)
    ]  # fmt: skip


def _naming(source: Source, format: str, dtype: str | None) -> Naming:
    if format == DEEPSEEK:
        return ORIGINAL
    expert = next(tensor for tensor in source.tensors if tensor.kind == EXPERT)
    return HF_APART if target_storage(expert, source.storage(expert), dtype).form else HF


class _Stored:
    """Tensors as they are to be written; the last one is kept, for its scales follow its values."""

    def __init__(self, source: Source, dtype: str | None, seen: Seen):
        self._source, self._dtype, self._seen = source, dtype, seen
        self._last: tuple[Tensor, Block] | None = None

    def target(self, tensor: Tensor) -> Storage:
        return target_storage(tensor, self._source.storage(tensor), self._dtype)

    def block(self, tensor: Tensor) -> Block:
        if self._last is None or self._last[0] is not tensor:
            self._last = None  # before the next is read: one at a time is in memory
            before = self._source.read(tensor)
            with about(self._source.where(tensor)):
                self._last = tensor, restore(before, self.target(tensor))
        return self._last[1]

    def values(self, tensors: tuple[Tensor, ...]) -> Iterator[np.ndarray]:
        for tensor in tensors:
            self._seen(tensor, self.block(tensor))
            yield self.block(tensor).values

    def scales(self, tensors: tuple[Tensor, ...]) -> Iterator[np.ndarray]:
        return (self.block(tensor).scales for tensor in tensors)


def _items(stored: _Stored, naming: Naming, file: FileTensor) -> Iterator[Item]:
    """Yield a tensor to be written and, where it is quantised, its scales."""
    targets = {stored.target(tensor) for tensor in file.tensors}
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
