"""Small checkpoints, written byte by byte: nothing here reads or writes as the package does."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsv4_jax import ModelConfig
from dsv4_jax.convert.names import HF, file_tensors
from dsv4_jax.convert.storage import released_storage, stored_shapes, written_dtypes
from dsv4_jax.convert.table import INTEGER, tensors_of

CONFIG = ModelConfig(
    vocab_size=8, hidden_size=8, layer_types=("csa", "hca"), moe_types=("hash", "learned"),
    num_attention_heads=2, head_dim=4, qk_rope_head_dim=2, q_lora_rank=4, o_groups=1, o_lora_rank=4,
    sliding_window=4, index_n_heads=2, index_head_dim=4, index_topk=2, n_routed_experts=2,
    num_experts_per_tok=1, moe_intermediate_size=8, hc_mult=2, num_nextn_predict_layers=0,
)  # fmt: skip
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BYTES_OF = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8}  # all others: 1


class Stored(NamedTuple):
    """A tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def filled(dtype: str, shape: tuple[int, ...], seed: int = 0) -> Stored:
    """Return a tensor of valid values."""
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape))
    if dtype in ("I32", "I64"):
        values = rng.integers(CONFIG.n_routed_experts, size=count).astype(f"i{BYTES_OF[dtype]}")
    elif dtype == "F8_E8M0":
        values = rng.integers(120, 130, size=count).astype("u1")
    elif dtype in BYTES_OF:
        words = rng.normal(size=count).astype("f4")
        values = (words.view("u4") >> 16).astype("u2") if dtype == "BF16" else words
        values = words.astype("f2") if dtype == "F16" else values
    else:
        values = rng.integers(0x70, size=count).astype("u1")  # any FP4 codes, finite FP8 codes
    return Stored(dtype, shape, values.tobytes())


def released() -> dict[str, Stored]:
    """Return a checkpoint with the original names, in FP4, FP8, E8M0, BF16, F32 and I64."""
    found = {}
    for seed, tensor in enumerate(tensors_of(CONFIG)):
        storage = released_storage(tensor)
        names = (tensor.name, tensor.name.removesuffix("weight") + "scale")
        shapes = stored_shapes(tensor.shape, storage.form)
        for name, dtype, shape in zip(names, written_dtypes(storage), shapes, strict=False):
            found[name] = filled(dtype, shape, seed)
    return found


def modules() -> dict[str, Stored]:
    """Return a checkpoint with the names of transformers' modules, in BF16, experts stacked."""
    return {
        file.name: filled(
            "I64" if file.tensors[0].kind == INTEGER else "BF16", file.shape(file.tensors[0].shape)
        )
        for file in file_tensors(HF, tensors_of(CONFIG))
    }


def parts(tensors: Mapping[str, Stored]) -> tuple[dict, bytes]:
    """Return the header and the data of a file of tensors."""
    header, data = {}, b""
    for name, (dtype, shape, values) in tensors.items():
        offsets = [len(data), len(data) + len(values)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        data += values
    return header, data


def joined(header: dict | bytes, data: bytes) -> bytes:
    """Build a safetensors file of its header, or of the text of that, and its data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def write_single(folder: Path, tensors: Mapping[str, Stored]) -> Path:
    """Write a checkpoint of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SINGLE).write_bytes(joined(*parts(tensors)))
    return folder


def write_sharded(folder: Path, tensors: Mapping[str, Stored], count: int = 3) -> dict:
    """Write a checkpoint of several files and return what its index holds."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    weight_map = {}
    for shard in range(count):
        file = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        chosen = names[shard::count]
        (folder / file).write_bytes(joined(*parts({name: tensors[name] for name in chosen})))
        weight_map |= dict.fromkeys(chosen, file)
    total = sum(len(tensor.data) for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return index


@contextlib.contextmanager
def memory_below(limit: float) -> Iterator[None]:
    """Check the bytes by which the resident memory of this process grows, at its highest."""
    Path("/proc/self/clear_refs").write_text("5")  # from now on the peak counts anew
    before = _peak()
    yield
    assert _peak() - before < limit


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
