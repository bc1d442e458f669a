"""Measure conversions of full-size layers of DeepSeek-V4-Flash: speed and peak memory.

    python benchmarks/convert.py --layers=2 --folder=DIR

Writes a checkpoint of random weights in the released format (FP4 experts, FP8 matrices; 3.6 GB a
layer, and 2.1 GB of embedding and head), then converts it. Each conversion runs in a process of its
own, from files that are not cached; beside it the speed at which the disk copies the same files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import app, flags

from dsv4_jax import ModelConfig
from dsv4_jax.convert.names import ORIGINAL, scale_name
from dsv4_jax.convert.output import Output
from dsv4_jax.convert.shards import Item, write_shards
from dsv4_jax.convert.storage import (
    VIEWED,
    released_storage,
    stored_bytes,
    stored_shapes,
    written_dtypes,
)
from dsv4_jax.convert.table import tensors_of
from dsv4_jax.hf_storage import StorageKeys
from dsv4_jax.hf_write import deepseek_config

LAYERS = flags.DEFINE_integer("layers", 2, "Full-size layers, CSA and HCA in turn.", lower_bound=1)
FOLDER = flags.DEFINE_string("folder", None, "Where to write; default: a temporary folder.")
OUTPUTS = flags.DEFINE_list(
    "outputs", ["deepseek", "hf", "deepseek:fp8", "hf:bfloat16", "orbax"], "Format or format:dtype."
)
GIB = 2**30
ROOT = Path(__file__).parent.parent
POOL_BYTES = 64 << 20  # random bytes that all tensors are cut from


def flash(layers: int) -> ModelConfig:
    """Return Flash with so many layers, the prediction block left out."""
    return ModelConfig(
        vocab_size=129_280, hidden_size=4096, layer_types=("csa", "hca") * (layers // 2)
        + ("csa",) * (layers % 2), moe_types=("learned",) * layers, num_attention_heads=64,
        num_nextn_predict_layers=0,
    )  # fmt: skip


def make_checkpoint(folder: Path, config: ModelConfig) -> tuple[int, int]:
    """Write random tensors as released; return the bytes of all and of the largest."""
    rng, items, sizes = np.random.default_rng(0), [], []
    pools = {dtype: _pool(rng, dtype) for dtype in ("I8", "F8_E4M3", "F8_E8M0", "BF16", "F32")}
    for tensor in tensors_of(config):
        storage = released_storage(tensor)
        sizes += [nbytes for _, nbytes in stored_bytes(tensor.shape, storage)]
        names = tensor.name, scale_name(tensor.name, ORIGINAL.scale_suffix)
        shapes = stored_shapes(tensor.shape, storage.form)
        for name, dtype, shape in zip(names, written_dtypes(storage), shapes, strict=False):
            start = int(rng.integers(POOL_BYTES // 8)) * 4
            items.append(Item(name, dtype, shape, _cut(pools[dtype], dtype, shape, start)))
    keys = StorageKeys(experts="fp4", linears="fp8")
    with Output(folder) as output:
        write_shards(output, items, max_shard_bytes=4 * 10**9)
        output.write_json("config.json", deepseek_config(config, keys))
    return sum(sizes), max(sizes)


def _pool(rng: np.random.Generator, dtype: str) -> np.ndarray:
    """Return bytes of random finite values."""
    count = POOL_BYTES // VIEWED[dtype].itemsize
    if dtype in ("BF16", "F32"):
        values = (0.02 * rng.standard_normal(count, np.float32)).astype(VIEWED[dtype])
        return values.view(np.uint8)
    low, high = (113, 118) if dtype == "F8_E8M0" else (0, 127 if dtype == "F8_E4M3" else 256)
    return rng.integers(low, high, count, dtype=np.uint8)


def _cut(pool: np.ndarray, dtype: str, shape: tuple[int, ...], start: int):
    """Return the pieces of a tensor: stretches of the pool, over and over."""
    nbytes = VIEWED[dtype].itemsize * int(np.prod(shape))

    def pieces() -> Iterator[np.ndarray]:
        left, at = nbytes, start
        while left:
            piece = pool[at : at + left]
            yield piece
            left, at = left - piece.nbytes, 0

    return pieces


def forget(folder: Path) -> None:
    """Write files out and drop them from the page cache."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(folder: Path, target: Path) -> float:
    """Copy a folder's files to disk and return how long it took."""
    forget(folder)
    start = time.perf_counter()
    shutil.copytree(folder, target)
    forget(target)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def convert(folder: Path, target: Path, output: str) -> tuple[float, int, int]:
    """Convert in a process of its own; return seconds, bytes written and peak bytes of memory."""
    to, _, dtype = output.partition(":")
    command = [sys.executable, "launch/convert.py", f"--input={folder}", f"--output={target}",
               f"--to={to}", *([f"--dtype={dtype}"] if dtype else [])]  # fmt: skip
    forget(folder)
    start = time.perf_counter()
    # Not getrusage, whose peak begins with that of the parent.
    code = (
        "import re, runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('PEAK', re.search('VmHWM:(.*) kB', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run(
        [command[0], "-c", code, *command[1:]], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    forget(target)
    seconds = time.perf_counter() - start
    written = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    shutil.rmtree(target)
    return seconds, written, 1024 * int(done.stdout.split("PEAK")[1])


def main(_) -> None:
    with tempfile.TemporaryDirectory(dir=FOLDER.value) as scratch:
        source, target = Path(scratch, "input"), Path(scratch, "output")
        total, largest = make_checkpoint(source, flash(LAYERS.value))
        bound = 2 * largest + GIB
        print(f"{LAYERS.value} layers of Flash, {total / 1e9:.1f} GB, largest tensor "
              f"{largest / 1e9:.2f} GB, memory allowed {bound / 1e9:.2f} GB\n")
        print("| output | GB written | s | GB/s read | GB/s written | peak GB |")
        print("|---|---|---|---|---|---|")
        seconds = copy_seconds(source, target)
        speed = total / seconds / 1e9
        cells = f"{total / 1e9:.1f} | {seconds:.1f} | {speed:.2f} | {speed:.2f}"
        print(f"| copy of the files | {cells} | |", flush=True)
        for output in OUTPUTS.value:
            seconds, written, peak = convert(source, target, output)
            print(f"| {output} | {written / 1e9:.1f} | {seconds:.1f} | {total / seconds / 1e9:.2f} "
                  f"| {written / seconds / 1e9:.2f} | {peak / 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    app.run(main)
