"""Write safetensors files, tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from dsv4_jax.arrays import contiguous
from dsv4_jax.convert.output import Output
from dsv4_jax.convert.storage import VIEWED
from dsv4_jax.convert.tensor_files import INDEX, SINGLE


class Item(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]  # its bytes in order; called once

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return VIEWED[self.dtype].itemsize * math.prod(self.shape)


def _safetensors(items: list[Item]) -> Iterator:
    """Yield the bytes of a safetensors file.

    Descending item sizes keep every tensor aligned, as the library's own writer does.
    """
    items = sorted(items, key=lambda item: -VIEWED[item.dtype].itemsize)
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
      done: is told each shard's name, tensors and whether an earlier attempt has left it.
    """
    shards = _split(items, max_shard_bytes)
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        kept = output.has(name)
        if not kept:
            output.write(name, _safetensors(shard))
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
