"""Write a checkpoint's folder: tensor by tensor, whole or not at all, and resumable."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsv4_jax.convert.tensor_files import INDEX, SINGLE, parse_json
from dsv4_jax.errors import InputError
from dsv4_jax.files import explain_failed_write
from dsv4_jax.quant import contiguous

PLAN = "conversion.json"  # what an unfinished conversion is of
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "I32": 4,
              "I64": 8}


class Item(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]  # its bytes in order; called once

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return ITEM_BYTES[self.dtype] * int(np.prod(self.shape, dtype=np.int64))


class Output:
    """A folder in the making, beside the one that it becomes at the end.

    The name of the output appears only when everything is in it, so that a killed conversion leaves
    nothing that looks complete; its finished shards stay in `.NAME.partial`, where the same
    conversion finds them again.

    Args:
      plan: what makes a conversion the same, as JSON types; None: start from nothing.
    Raises:
      InputError: the output exists, cannot be written, or an unfinished conversion of something
        else is there.
    """

    def __init__(self, path: Path, plan: dict | None = None):
        path = path.absolute()
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise InputError(f"{path}: expected a new folder, got one that exists; choose another")
        self.path, self.folder = path, path.with_name(f".{path.name}.partial")
        with explain_failed_write(self.folder, "output"):
            # Without a plan nobody knows whose files these are.
            if self.folder.exists() and (plan is None or not (self.folder / PLAN).exists()):
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / PLAN
        if file.exists():
            if parse_json(file, file.read_bytes()) != plan:
                raise InputError(
                    f"{self.folder}: expected an unfinished conversion of the same input and "
                    f"flags, got another; delete it or choose another output than {path}"
                )
        elif plan is not None:
            self.write(PLAN, json.dumps(plan).encode())

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        self._write(name, [data])

    def write_json(self, name: str, document: Mapping) -> None:
        """Write a JSON file as published checkpoints have them."""
        self.write(name, (json.dumps(document, indent=2) + "\n").encode())

    def has(self, name: str) -> bool:
        """Say whether a file is finished."""
        return (self.folder / name).exists()

    def write_tensors(self, name: str, items: list[Item]) -> None:
        """Write a safetensors file, piece by piece."""
        # Descending item sizes keep every tensor aligned, as the library's own writer does.
        items = sorted(items, key=lambda item: -ITEM_BYTES[item.dtype])
        self._write(name, _safetensors(items))

    def _write(self, name: str, pieces: Iterable) -> None:
        """Write a file under its name only when all of it is on disk."""
        writing = self.folder / f"{name}.writing"
        writing.parent.mkdir(parents=True, exist_ok=True)
        with explain_failed_write(self.folder, "output"), open(writing, "wb", buffering=0) as file:
            for piece in pieces:
                view = memoryview(piece).cast("B")
                while view:
                    view = view[file.write(view) :]
            os.fsync(file.fileno())
        os.replace(writing, self.folder / name)

    def discard(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def finish(self) -> None:
        """Give the folder its name."""
        with explain_failed_write(self.path, "output"):
            (self.folder / PLAN).unlink(missing_ok=True)
            if self.path.exists():
                self.path.rmdir()
            os.replace(self.folder, self.path)
            parent = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(parent)
            os.close(parent)


def _safetensors(items: list[Item]) -> Iterator:
    """Yield the bytes of a safetensors file."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for item in items:
        end = offset + item.nbytes
        header[item.name] = {
            "dtype": item.dtype, "shape": list(item.shape), "data_offsets": [offset, end]
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # mapped tensors then start where kernels like them
    yield len(text).to_bytes(8, "little") + text
    for item in items:
        written = 0
        for piece in item.pieces():
            piece = contiguous(piece).reshape(-1).view(np.uint8)
            written += piece.nbytes
            yield piece
        assert written == item.nbytes, f"{item.name}: {written} of {item.nbytes} bytes"


def write_shards(
    output: Output, items: list[Item], *, max_shard_bytes: int,
    done: Callable[[str, list[Item], bool], None] = lambda *_: None,
) -> None:
    """Write tensors as `model.safetensors`, or as shards with an index.

    Args:
      max_shard_bytes: a shard begins when the tensors of the one before would exceed it.
      done: is told each shard's name, tensors and whether it was there already.
    """
    shards = _split(items, max_shard_bytes)
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        kept = output.has(name)
        if not kept:
            output.write_tensors(name, shard)
        done(name, shard, kept)
    if len(shards) > 1:
        places = {
            item.name: name for name, shard in zip(names, shards, strict=True) for item in shard
        }
        total = sum(item.nbytes for item in items)
        output.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _split(items: list[Item], max_bytes: int) -> list[list[Item]]:
    shards, held = [[]], 0
    for item in items:
        if shards[-1] and held + item.nbytes > max_bytes:
            shards.append([])
            held = 0
        shards[-1].append(item)
        held += item.nbytes
    return shards
