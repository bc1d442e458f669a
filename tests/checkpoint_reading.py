"""Read checkpoints as the loader does, and check what it says of bad ones."""

from __future__ import annotations

from pathlib import Path

import checkpoint_files as files
import numpy as np
import pytest
import safetensors
import torch
from checkpoint_files import CONFIG

from dsv4_jax import InputError
from dsv4_jax.convert import untrusted
from dsv4_jax.convert.source import FileSource
from dsv4_jax.convert.tensor_files import open_tensors
from dsv4_jax.quant import Block

RELEASED, MODULES = files.released(), files.modules()
GOOD = files.parts(RELEASED)
TORCH_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32,
    "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
LONGEST = 8000  # characters of a message without the folder, whatever is in the files
EVIL_NAMES = (
    "../../etc/passwd", "", "\0", "a\nb", "x" * 10_000, "\n" * 10_000, "norm.weight ", "\u202e",
    "layers.99.attn.wq_a.weight", "__metadata__2", "mtp.0.markov_head.weight", "'", "\x1b[31m",
)  # fmt: skip


def read_all(folder: Path) -> dict[str, Block]:
    source = FileSource(folder, open_tensors(folder), CONFIG)
    return {tensor.name: source.read(tensor) for tensor in source.tensors}


def checked(error: InputError, folder: Path) -> str:
    """Return a message, which must be one short line that names the folder."""
    message = str(error)
    assert str(folder) in message
    assert len(message.splitlines()) == 1 and message.isprintable()
    assert len(message) < LONGEST + len(str(folder)) * (untrusted.SHOWN + 1)
    return message


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_all(folder)
    return checked(caught.value, folder)


def numbers(stored: dict) -> np.ndarray:
    """Return what the library read, as float64, by torch's account of the formats."""
    data, shape = bytearray(stored["data"]), stored["shape"]
    if stored["dtype"] in ("I8", "U8"):
        halves = torch.frombuffer(data, dtype=torch.uint8).numpy()
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[np.stack([halves & 7, halves >> 4 & 7])]
        return values.max(axis=0).reshape(shape)  # magnitudes: are they finite?
    if stored["dtype"] == "F8_E8M0":
        bits = torch.frombuffer(data, dtype=torch.uint8).numpy().astype(np.float64)
        return np.where(bits == 255, np.nan, 2.0 ** (bits - 127)).reshape(shape)
    values = torch.frombuffer(data, dtype=TORCH_DTYPES[stored["dtype"]])
    return values.double().numpy().reshape(shape)


def check_loaded(blocks: dict[str, Block], whole: bytes) -> None:
    """Check that what was read is what the library reads, and that all of it is valid."""
    stored = dict(safetensors.deserialize(whole))
    held = [part for b in blocks.values() for part in (b.values, b.scales) if part is not None]
    assert len(stored) == len(held)
    largest = float(np.finfo(np.float32).max)
    for name, block in blocks.items():
        assert block.values.tobytes() == stored[name]["data"]
        values = numbers(stored[name])
        if block.form:
            scale = stored[name.removesuffix("weight") + "scale"]
            assert block.scales.tobytes() == scale["data"]
            assert np.all(numbers(scale) > 0)
            values = values * numbers(scale)  # here a row or a matrix has one scale
        assert np.all(np.abs(values) <= largest), name
        if name.endswith("tid2eid"):
            assert np.all((values >= 0) & (values < CONFIG.n_routed_experts))
