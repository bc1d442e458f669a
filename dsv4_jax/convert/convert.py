"""Convert a checkpoint's folder into one of another format, tensor by tensor."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from dsv4_jax.convert.leaves import Leaf, leaf_slice, leaves_of
from dsv4_jax.convert.opening import PARAMS, open_checkpoint
from dsv4_jax.convert.orbax_leaves import LeafPlan, write_leaves
from dsv4_jax.convert.report import Report
from dsv4_jax.convert.save import (
    DEEPSEEK,
    HF_FORMAT,
    MAX_SHARD_BYTES,
    items_of,
    storage_keys,
    write_config,
)
from dsv4_jax.convert.shards import Item, Output, write_shards
from dsv4_jax.convert.source import Source, about
from dsv4_jax.convert.storage import INT32, PLAIN_DTYPES, Storage, check_dtype, target_storage
from dsv4_jax.convert.table import INTEGER, Tensor
from dsv4_jax.convert.tensor_files import checked_path
from dsv4_jax.errors import InputError
from dsv4_jax.files import explain_failed_write
from dsv4_jax.log import say
from dsv4_jax.quant import BFLOAT16

ORBAX = "orbax"
FORMATS = (HF_FORMAT, DEEPSEEK, ORBAX)
# Files that belong to a checkpoint and are copied as they are. Nothing of them is run or rendered.
CARRIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json", "README.md", "LICENSE",
)  # fmt: skip


def convert(
    source: str | os.PathLike, output: str | os.PathLike | None, *, to: str | None,
    dtype: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES, skip_mtp: bool = False,
    dry_run: bool = False,
) -> Report:
    """Convert a checkpoint: safetensors in any naming, an Orbax folder or a training's workdir.

    Tensors pass through memory one at a time. What is quantised and stays so is copied byte for
    byte. The output appears only when it is complete; a conversion that was killed goes on from its
    finished files when it is started again.

    Args:
      output: a folder that does not exist yet; not used by a dry run.
      to: "hf", "deepseek" or "orbax"; not used by a dry run.
      dtype: see `save_pretrained`; "orbax" has no quantised weights: there None makes bfloat16 of
        them.
      dry_run: check names, shapes and dtypes of the input and count what would be written; no data
        is read and nothing written.
    Raises:
      InputError: one line with the path, the tensor and the reason.
    """
    if not dry_run:
        _check_arguments(to, dtype, max_shard_bytes)
    opened = open_checkpoint(Path(source), skip_mtp=skip_mtp)
    say(f"{source}: {opened.title}, {len(opened.source.tensors):,} weights")
    report = Report()
    for tensor in opened.source.tensors:
        stored = opened.source.storage(tensor)
        report.count(tensor, stored if dry_run else _written(tensor, stored, to, dtype))
    if dry_run:
        return report
    plan = {
        "input": str(Path(source).resolve()), "files": _describe_files(Path(source)), "to": to,
        "dtype": dtype, "max_shard_bytes": max_shard_bytes, "skip_mtp": skip_mtp,
    }
    keys = storage_keys(opened.source, dtype)
    folder = Output(Path(output), plan)
    start = time.perf_counter()
    if to == ORBAX:
        _write_orbax(folder, opened.source, dtype, report)
    else:
        items = items_of(opened.source, to, dtype, report.measure)
        write_shards(folder, items, max_shard_bytes=max_shard_bytes, done=_progress())
    for name in CARRIED:
        if (Path(source) / name).is_file():
            _copy(checked_path(Path(source), name), folder, name)
    format = HF_FORMAT if to == ORBAX else to
    write_config(folder, opened.source.config, keys, format, opened.config_json)
    folder.finish()
    report.seconds = time.perf_counter() - start
    return report


def _check_arguments(to: str, dtype: str | None, max_shard_bytes: int) -> None:
    if to not in FORMATS:
        raise InputError(f"to: expected one of {', '.join(FORMATS)}, got {to!r}")
    check_dtype(dtype)
    if to == ORBAX and dtype not in (None, *PLAIN_DTYPES):
        raise InputError(f"dtype: expected one of {', '.join(PLAIN_DTYPES)} for orbax, got {dtype}")
    if max_shard_bytes < 1:
        raise InputError(f"max_shard_bytes: expected at least 1, got {max_shard_bytes}")


def _written(tensor: Tensor, stored: Storage, to: str, dtype: str | None) -> Storage:
    """Return how a tensor is written: Orbax's files have neither quantised weights nor int64."""
    target = target_storage(tensor, stored, dtype)
    if to != ORBAX:
        return target
    return Storage(BFLOAT16 if target.form else INT32 if tensor.kind == INTEGER else target.dtype)


def _describe_files(folder: Path) -> list:
    """Return what tells whether a folder is still the same: names, sizes and times of its files."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            stat = path.stat()
            found.append([str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns])
    return found


def _progress() -> Callable[[str, list[Item], bool], None]:
    """Say of every file how large and how fast it was."""
    start = time.perf_counter()

    def done(name: str, items: list[Item], kept: bool) -> None:
        nonlocal start
        size, now = sum(item.nbytes for item in items), time.perf_counter()
        speed = "kept from an earlier run" if kept else f"{size / (now - start) / 1e9:.2f} GB/s"
        say(f"{name}: {len(items):,} tensors, {size / 1e9:.2f} GB, {speed}")
        start = now

    return done


def _write_orbax(folder: Output, source: Source, dtype: str | None, report: Report) -> None:
    """Write parameters as `Transformer` has them, stacked leaves slice by slice."""
    plans = {
        leaf.path: _leaf_plan(source, leaf, dtype, report)
        for leaf in leaves_of(source.config, source.tensors)
    }
    with explain_failed_write(folder.folder, "output"):
        shutil.rmtree(folder.folder / PARAMS, ignore_errors=True)  # of a run that was killed
    write_leaves(folder.folder / PARAMS, plans)


def _leaf_plan(source: Source, leaf: Leaf, dtype: str | None, report: Report) -> LeafPlan:
    parts = {part.index: (tensor, part) for tensor, part in leaf.parts}
    written = {_written(tensor, source.storage(tensor), ORBAX, dtype) for tensor, _ in leaf.parts}
    dtype = np.dtype(jnp.result_type(*(storage.dtype for storage in written)))

    def read(index: tuple[int, ...]) -> np.ndarray:
        tensor, part = parts[index]
        block = source.read(tensor)
        if part.start == 0:  # else it was measured with its first rows
            report.measure(tensor, block)
        with about(source.where(tensor)):
            return leaf_slice(block, part, dtype)

    return LeafPlan(leaf.shape, dtype, leaf.stacked, read)


def _copy(path: Path, folder: Output, name: str) -> None:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; copy it again") from error
    folder.write(name, data)
