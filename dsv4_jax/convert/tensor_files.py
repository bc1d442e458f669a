"""Find the tensors of a safetensors checkpoint, believing nothing that its files say.

Headers are validated by the safetensors library. Its NumPy loader knows neither FP8 nor E8M0 nor
packed FP4, so that the bytes are viewed here, through memory maps of single tensors. No pickle is
ever opened.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors

from dsv4_jax.convert.storage import VIEWED
from dsv4_jax.convert.untrusted import (
    checked_path,
    explain_failed_search,
    parse_json,
    raise_all,
    read_json,
)
from dsv4_jax.errors import InputError, shown

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz")
LARGEST_HEADER = 32 << 20  # bytes; all 145,116 tensors of V4-Pro in one file need 22 MB
LARGEST_INDEX = 64 << 20  # bytes
MOST_SHARDS = 10_000  # each is looked up on disk before any is opened


class Entry(NamedTuple):
    """A tensor in a file."""

    path: Path
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    nbytes: int

    def view(self) -> np.ndarray:
        """Map the tensor's bytes: an array that reads them when it is used, and not before.

        Raises:
          InputError: the file cannot be read or is shorter than it was.
        """
        dtype = VIEWED[self.dtype]
        if not self.nbytes:
            return np.empty(self.shape, dtype)
        before = self.offset % mmap.ALLOCATIONGRANULARITY
        try:
            with open(self.path, "rb") as file:
                mapped = mmap.mmap(
                    file.fileno(), before + self.nbytes, access=mmap.ACCESS_READ,
                    offset=self.offset - before,
                )
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path}: cannot be read: {error}; copy it again") from error
        data = np.frombuffer(mapped, np.uint8, self.nbytes, before)
        return data.view(dtype).reshape(self.shape)


def open_tensors(folder: Path) -> dict[str, Entry]:
    """Return the tensors of a checkpoint's folder by name; no data is read.

    Raises:
      InputError: there is no safetensors checkpoint, only pickles; the index, a shard's name or a
        header is not what it must be; index and shards do not agree; something cannot be read.
    """
    with explain_failed_search(folder):
        return _open(folder)


def _open(folder: Path) -> dict[str, Entry]:
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a checkpoint's folder, got none; check the path")
    index = folder / INDEX
    if index.exists():
        return _open_indexed(folder, *_read_index(index))
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) != 1:
        raise InputError(f"{folder}: {_no_tensors(folder, found)}")
    path = checked_path(folder, found[0])
    return read_header(path)


def _no_tensors(folder: Path, found: list[str]) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    pickles = [name for name in names if name.isprintable()]  # a message is one line
    if found:
        return f"expected {INDEX} beside {len(found)} shards, got none; copy it from the source"
    if pickles:
        return (
            f"expected safetensors files, got {pickles[0]}, a pickle, which can run code and is "
            "never opened; load it with the program that wrote it and save it as safetensors "
            "(transformers: save_pretrained)"
        )
    return f"expected {SINGLE} or {INDEX}, got neither; name the folder that holds them"


def _read_index(index: Path) -> tuple[dict[str, str], int | None]:
    """Return the map from tensors to shards, and the bytes of all tensors if they are given."""
    document = read_json(index.parent, index.name, LARGEST_INDEX)
    if not isinstance(document.get("weight_map"), dict):
        raise InputError(f"{index}: expected an object with a weight_map, got none; copy it again")
    shards = document["weight_map"]
    for name, shard in shards.items():
        if not isinstance(shard, str):
            raise InputError(
                f"{index}: tensor {shown(name)}: expected a shard's file name, got "
                f"{shown(shard)}"
            )
    metadata = document.get("metadata")
    if not isinstance(metadata, (dict, type(None))):
        raise InputError(f"{index}: metadata: expected an object, got {shown(metadata)}")
    total = (metadata or {}).get("total_size")
    if total is not None and (not isinstance(total, int) or isinstance(total, bool) or total < 0):
        raise InputError(f"{index}: total_size: expected bytes, got {shown(total)}")
    return shards, total


def _open_indexed(folder: Path, shards: dict[str, str], total: int | None) -> dict[str, Entry]:
    paths, problems, names = {}, [], sorted(set(shards.values()))
    if len(names) > MOST_SHARDS:
        raise InputError(
            f"{folder / INDEX}: expected at most {MOST_SHARDS} shards, got {len(names)}"
        )
    for shard in names:
        try:
            if not shard.endswith(".safetensors"):
                raise InputError(f"{shown(shard)}: expected a .safetensors file")
            paths[shard] = checked_path(folder, shard)
        except InputError as error:
            problems.append(str(error))
    raise_all(folder / INDEX, problems)
    size = sum(path.stat().st_size for path in paths.values())
    if total is not None and not size - len(paths) * LARGEST_HEADER <= total <= size:
        raise InputError(
            f"{folder / INDEX}: total_size: expected about the shards' {size} bytes, got "
            f"{shown(total)}; a shard may be missing or incomplete: copy them again"
        )
    entries = {}
    for shard, path in paths.items():
        for name, entry in read_header(path).items():
            if shards.get(name) != shard:
                claimed = shown(shards[name]) if name in shards else "no shard"
                problems.append(
                    f"tensor {shown(name)}: expected in {claimed}, as {INDEX} says, "
                    f"got it in {shard}"
                )
            entries[name] = entry
    problems += [
        f"tensor {shown(name)}: expected in {shown(shard)}, as {INDEX} says, got none"
        for name, shard in shards.items()
        if name not in entries
    ]
    raise_all(folder, problems)
    held = sum(entry.nbytes for entry in entries.values())
    if total not in (None, held):
        raise InputError(
            f"{folder / INDEX}: total_size: expected the tensors' {held} bytes, got {total}; copy "
            "the index again"
        )
    return entries


def read_header(path: Path) -> dict[str, Entry]:
    """Return the tensors of one safetensors file; no data is read.

    Raises:
      InputError: the file is not a whole and valid safetensors file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(LARGEST_HEADER, size - 8):
                raise InputError(
                    f"{path}: expected a header of at most {LARGEST_HEADER} bytes within the "
                    f"file's {size}, got {length}; {_mend(path)}"
                )
            text = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {shown(str(error))}; {_mend(path)}") from error
    header = parse_json(path, text)
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except (OSError, safetensors.SafetensorError) as error:
        # The library's words have names and values of the file in them, of any length.
        words = f"expected a safetensors file: {shown(str(error))}"
        fault = _find_fault(header, size - 8 - length) or words
        raise InputError(f"{path}: {fault}; {_mend(path)}") from error
    return _entries(path, header, 8 + length)


def _mend(path: Path) -> str:
    return f"copy {path.name} again"


def _entries(path: Path, header: dict, start: int) -> dict[str, Entry]:
    """Return the entries of a header that the library found valid."""
    header.pop("__metadata__", None)
    entries = {}
    for name, info in header.items():
        first, last = info["data_offsets"]
        shape = tuple(info["shape"])
        entries[name] = Entry(path, info["dtype"], shape, start + first, last - first)
    return entries


def _find_fault(header: object, held: int) -> str:
    """Say what is wrong with a header that the library refused, naming the tensor.

    Args:
      held: bytes of data in the file.
    Returns:
      "" if the fault is of another kind.
    """
    if not isinstance(header, dict):
        return ""
    tensors = {name: info for name, info in header.items() if name != "__metadata__"}
    for name, info in tensors.items():
        if fault := _fault_of_entry(info):
            return f"tensor {shown(name)}: {fault}"
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = info["data_offsets"]
        if first != end:
            return f"tensor {shown(name)}: expected data from byte {end} on, got {shown(first)}"
        end = last
    return "" if end == held else f"expected {end} bytes of tensors, got {held}"


def _fault_of_entry(info: object) -> str:
    """Say what is wrong with one tensor of a header, or return ""."""
    fields = ("dtype", "shape", "data_offsets")
    if not isinstance(info, dict) or not info.keys() >= set(fields):
        return f"expected {', '.join(fields)}, got {shown(info)}"
    dtype, shape, offsets = (info[field] for field in fields)
    if not isinstance(dtype, str) or dtype not in VIEWED:
        return f"expected one of {', '.join(VIEWED)}, got {shown(dtype)}"
    if not _are_sizes(shape):
        return f"expected sizes as its shape, got {shown(shape)}"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"expected first and last data_offsets, got {shown(offsets)}"
    nbytes, too_many = VIEWED[dtype].itemsize, 1 << 64
    for size in shape:
        nbytes = min(nbytes * size, too_many)  # the product of a million sizes would take minutes
    if nbytes == too_many:
        return f"expected a shape that a file can hold, got {shown(shape)}"
    if nbytes == offsets[1] - offsets[0]:
        return ""
    return f"expected {nbytes} bytes of {dtype} in shape {shown(shape)}, got {shown(offsets)}"


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 64 for v in values)
