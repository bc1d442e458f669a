"""Convert a checkpoint's folder into one of another format, tensor by tensor."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np

from dsv4_jax.convert.leaves import Leaf, leaf_dtype, leaf_slice, leaves_of
from dsv4_jax.convert.opening import PARAMS, open_checkpoint
from dsv4_jax.convert.orbax_leaves import LeafPlan, write_leaves
from dsv4_jax.convert.output import Output
from dsv4_jax.convert.report import Report
from dsv4_jax.convert.save import (
    DEEPSEEK,
    HF_FORMAT,
    MAX_SHARD_BYTES,
    check_shard_bytes,
    config_documents,
    items_of,
    storage_keys,
)
from dsv4_jax.convert.shards import Item, write_shards
from dsv4_jax.convert.source import Source, about, targets_of
from dsv4_jax.convert.storage import DTYPES, PLAIN_DTYPES, Storage, dtype_name
from dsv4_jax.convert.untrusted import checked_path, explain_failed_read
from dsv4_jax.errors import InputError, shown
from dsv4_jax.terminal import say

ORBAX = "orbax"
FORMATS = (HF_FORMAT, DEEPSEEK, ORBAX)
KEPT = "kept from an earlier run"
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
      output: a folder that does not exist yet, or is empty; not used by a dry run.
      to: "hf", "deepseek" or "orbax"; None in a dry run: as the input is stored.
      dtype: see `save_pretrained`; "orbax" has no quantised weights: there None makes bfloat16 of
        them.
      dry_run: check names, shapes and dtypes of the input and whether the format can say them, and
        count what would be written; no data is read and nothing written.
    Raises:
      InputError: one line with the path, the tensor and the reason.
    """
    dtype = _check_arguments(output, to, dtype, max_shard_bytes, dry_run)
    folder = Path(source)
    opened = open_checkpoint(folder, skip_mtp=skip_mtp)
    tensors = opened.source.tensors
    say(f"{source}: {opened.title}, {len(tensors):,} weights")
    report, targets = Report(), _targets(opened.source, to, dtype)
    for tensor in tensors:
        report.count(tensor, targets[tensor.name])
    if to is None:
        return report
    # All that can be refused is, before the first file is written.
    keys = storage_keys(opened.source, targets)
    format = HF_FORMAT if to == ORBAX else to
    documents = config_documents(opened.source.config, keys, format, opened.config_json)
    carried = {
        name: checked_path(folder, name) for name in CARRIED if os.path.lexists(folder / name)
    }
    write = _writer(opened.source, to, targets, max_shard_bytes, report)
    if dry_run:
        return report
    plan = {
        "input": str(folder.resolve()), "files": _describe((*opened.files, *carried.values())),
        "to": to, "dtype": dtype, "max_shard_bytes": max_shard_bytes, "skip_mtp": skip_mtp,
    }
    start = time.perf_counter()
    with Output(Path(output), plan) as out:
        write(out)
        for name, path in carried.items():
            with explain_failed_read(path):
                data = path.read_bytes()
            out.write(name, [data])
        for name, document in documents.items():
            out.write_json(name, document)
    report.seconds = time.perf_counter() - start
    return report


def _check_arguments(
    output: object, to: str | None, dtype: object, max_shard_bytes: int, dry_run: bool
) -> str | None:
    """Check what needs no input, and return the name of the dtype."""
    if to not in FORMATS and not (dry_run and to is None):
        raise InputError(f"to: expected one of {', '.join(FORMATS)}, got {shown(to)}")
    name = dtype_name(dtype, PLAIN_DTYPES if to == ORBAX else DTYPES)
    if to is None and name is not None:
        raise InputError(f"to: expected one of {', '.join(FORMATS)} beside a dtype, got none")
    if output is None and not dry_run:
        raise InputError("output: expected a folder that does not exist yet, got none")
    check_shard_bytes(max_shard_bytes)
    return name


def _targets(source: Source, to: str | None, dtype: str | None) -> dict[str, Storage]:
    """Return how tensors are written, by name: Orbax's files have no quantised weights."""
    if to is None:
        return {tensor.name: source.storage(tensor) for tensor in source.tensors}
    targets = targets_of(source, dtype)
    if to != ORBAX:
        return targets
    return {
        tensor.name: Storage(leaf_dtype(leaf, targets))
        for leaf in leaves_of(source.config, source.tensors) for tensor, _ in leaf.parts
    }  # fmt: skip


def _describe(paths: Iterable[Path]) -> list:
    """Return what tells whether files, and those of folders, are still the same."""
    found = []
    for path in paths:
        with explain_failed_read(path):
            for file in sorted(path.rglob("*")) if path.is_dir() else (path,):
                stat = file.stat()
                found.append([str(file), stat.st_size, stat.st_mtime_ns])
    return found


def _progress(report: Report) -> Callable[[str, list[Item], bool], None]:
    """Say of every file how large and how fast it was."""
    start = time.perf_counter()

    def done(name: str, items: list[Item], kept: bool) -> None:
        nonlocal start
        size, now = sum(item.nbytes for item in items), time.perf_counter()
        report.kept_bytes += size if kept else 0
        speed = KEPT if kept else f"{size / (now - start) / 1e9:.2f} GB/s"
        say(f"{name}: {len(items):,} tensors, {size / 1e9:.2f} GB, {speed}")
        start = now

    return done


def _writer(
    source: Source, to: str, targets: dict[str, Storage], max_shard_bytes: int, report: Report
) -> Callable[[Output], None]:
    """Return what writes the tensors; until it is called nothing of them is read."""
    if to != ORBAX:
        items, done = items_of(source, to, targets, report.measure), _progress(report)
        return partial(write_shards, items=items, max_shard_bytes=max_shard_bytes, done=done)
    # Parameters as `Transformer` has them, stacked leaves slice by slice.
    plans = {
        leaf.path: _leaf_plan(source, leaf, leaf_dtype(leaf, targets), report)
        for leaf in leaves_of(source.config, source.tensors)
    }

    def write(output: Output) -> None:
        if output.has(PARAMS):
            report.kept_bytes = report.bytes
            say(f"{PARAMS}: {len(plans):,} arrays, {report.bytes / 1e9:.2f} GB, {KEPT}")
        else:
            write_leaves(output.folder / PARAMS, plans)

    return write


def _leaf_plan(source: Source, leaf: Leaf, dtype: np.dtype, report: Report) -> LeafPlan:
    parts = {part.index: (tensor, part) for tensor, part in leaf.parts}

    def read(index: tuple[int, ...]) -> np.ndarray:
        tensor, part = parts[index]
        block = source.read(tensor)
        if part.start == 0:  # else it was measured with its first rows
            report.measure(tensor, block)
        with about(source.where(tensor)):
            return leaf_slice(block, part, dtype)

    return LeafPlan(leaf.shape, dtype, leaf.stacked, read)
