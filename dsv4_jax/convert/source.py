"""Where a conversion takes tensors from: the files of a safetensors checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from dsv4_jax.config import ModelConfig
from dsv4_jax.convert.check import check_entries, check_table
from dsv4_jax.convert.names import ORIGINAL, Naming, file_tensors, naming_of
from dsv4_jax.convert.storage import VIEWED, Storage, form_of, target_storage
from dsv4_jax.convert.table import INTEGER, Part, Tensor, tensors_of
from dsv4_jax.convert.tensor_files import Entry
from dsv4_jax.errors import InputError, shown
from dsv4_jax.quant import Block, check_block, check_codes, check_scales, may_overflow

WHOLE = (slice(None), slice(None))
DRAFT_HEADS = ("main_proj", "markov_head", "confidence_head")  # of DSpark checkpoints


class Source(Protocol):
    """The tensors of a model, as they are stored somewhere."""

    config: ModelConfig
    tensors: tuple[Tensor, ...]

    def storage(self, tensor: Tensor) -> Storage:
        """Say how a tensor is stored, without reading it."""

    def read(self, tensor: Tensor) -> Block:
        """Return a tensor as it is stored, checked."""

    def read_scales(self, tensor: Tensor, index: tuple[slice, slice] = WHOLE) -> np.ndarray:
        """Return scales of a quantised tensor, checked."""

    def read_part(self, tensor: Tensor, part: Part, index: tuple[slice, ...]) -> Block:
        """Return what belongs to a part of a leaf's slice, unchecked."""

    def where(self, tensor: Tensor) -> str:
        """Return the place and name of a tensor, for messages."""


def targets_of(source: Source, dtype: str | None) -> dict[str, Storage]:
    """Return how each tensor is to be written, by its name; see `save_pretrained`."""
    return {
        tensor.name: target_storage(tensor, source.storage(tensor), dtype)
        for tensor in source.tensors
    }


@contextlib.contextmanager
def about(where: str) -> Iterator[None]:
    """Put in front of an InputError what it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def check_values(block: Block, tensor: Tensor, config: ModelConfig) -> None:
    """Raise an InputError unless values and scales are finite, and expert ids in range."""
    if tensor.kind == INTEGER:
        check_table(block.values, config)
    else:
        check_block(block)


class FileSource:
    """A safetensors checkpoint, whose names, shapes and dtypes are checked when it is opened.

    Args:
      entries: of the folder, by name: see `tensor_files.open_tensors`.
    Attributes:
      config: of what there is; without the prediction block where transformers left that out.
    Raises:
      InputError: see `check.check_entries`.
    """

    def __init__(self, folder: Path, entries: Mapping[str, Entry], config: ModelConfig):
        with about(str(folder)):
            self.naming: Naming = naming_of(entries.keys(), tensors_of(config))
        # Transformers ignores the block when it loads and drops it when it saves.
        if self.naming is not ORIGINAL and not any(map(is_of_mtp, entries)):
            config = dataclasses.replace(config, num_nextn_predict_layers=0)
        self.config, self.tensors = config, tensors_of(config)
        files = file_tensors(self.naming, self.tensors)
        self._entries, self._scales = entries, check_entries(folder, entries, files)
        self._places = {
            tensor.name: (file, index)
            for file in files for index, tensor in enumerate(file.tensors)
        }  # fmt: skip

    def storage(self, tensor: Tensor) -> Storage:
        """Say how a tensor is stored, without reading it."""
        name = self._places[tensor.name][0].name
        dtype, scales = self._entries[name].dtype, self._scales.get(name)
        return Storage(
            VIEWED[dtype], form_of(dtype), None if scales is None else VIEWED[scales.dtype]
        )

    def read(self, tensor: Tensor) -> Block:
        """Return a tensor as it is stored, checked.

        Raises:
          InputError: a scale or value is not finite, or an expert id is out of range.
        """
        block = self._block(tensor)
        with about(self.where(tensor)):
            check_values(block, tensor, self.config)
        return block

    def read_part(self, tensor: Tensor, part: Part, index: tuple[slice, ...]) -> Block:
        """Return those values of a tensor that belong to a part of a leaf's slice, unchecked.

        Args:
          index: a slice of each axis of the leaf's slice that `part` fills.
        """
        _, picks = part.layout.restrict(index)
        picks[0] = picks[0] + part.start
        block = self._block(tensor)
        if block.form is not None:
            picks[1] = np.unique(picks[1] // block.form.per_byte)  # whole bytes
        return _pick(block, picks)

    def read_codes(self, tensor: Tensor, index: tuple[slice, slice]) -> np.ndarray:
        """Return some rows and columns of a quantised tensor's stored bytes, checked.

        Raises:
          InputError: one is no number.
        """
        block = self._block(tensor)
        codes = block.values[index]
        with about(self.where(tensor)):
            check_codes(codes, block.form)
        return codes

    def read_scales(self, tensor: Tensor, index: tuple[slice, slice] = WHOLE) -> np.ndarray:
        """Return some rows and columns of a quantised tensor's scales, checked.

        Raises:
          InputError: a scale is not finite, or a product with it is not.
        """
        block = self._block(tensor)
        scales = block.scales[index]
        with about(self.where(tensor)):
            check_scales(scales)
            if may_overflow(scales, block.form):
                check_block(block)
        return scales

    def where(self, tensor: Tensor) -> str:
        """Return the file and name of a tensor, for messages."""
        name = self._places[tensor.name][0].name
        return f"{self._entries[name].path}: tensor {name!r}"

    def _block(self, tensor: Tensor) -> Block:
        file, index = self._places[tensor.name]
        entry = self._entries[file.name]
        values, form = file.pick(entry.view(), index), form_of(entry.dtype)
        if form is None:
            return Block(values)
        return Block(values, file.pick(self._scales[file.name].view(), index), form)


def is_of_mtp(name: str) -> bool:
    """Say whether a tensor belongs to the multi-token prediction block, of whatever kind."""
    return name.startswith("mtp.")


def refuse_draft_heads(names: Iterable[str]) -> None:
    """Raise an InputError if the prediction block is one of DSpark, by the name of a tensor."""
    found = sorted(
        name for name in names if is_of_mtp(name) and any(mark in name for mark in DRAFT_HEADS)
    )
    if found:
        raise InputError(
            f"tensor {shown(found[0])}: expected DeepSeek-V4's multi-token prediction block under "
            "mtp.*, got a DSpark draft head; leave it out by skip_mtp (--skip_mtp; to train: "
            "--config.model.num_nextn_predict_layers=0)"
        )


def _pick(block: Block, picks: list[np.ndarray]) -> Block:
    """Return the values of a block at indices on each axis."""
    chosen = tuple(map(_as_slice, picks))
    contiguous = all(isinstance(pick, slice) for pick in chosen)
    values = block.values[chosen if contiguous else np.ix_(*picks)]
    if block.form is None:
        return Block(values)
    return dataclasses.replace(block, values=values, rows=chosen[0], columns=chosen[1])


def _as_slice(pick: np.ndarray) -> slice | np.ndarray:
    """Write indices that follow one another as a slice."""
    if len(pick) and pick[-1] - pick[0] == len(pick) - 1:
        return slice(int(pick[0]), int(pick[-1]) + 1)
    return pick
