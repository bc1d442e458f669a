"""Find out what a checkpoint's folder is, and open it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from dsv4_jax.checkpoint import CHECKPOINTS, check_checkpoint, committed_steps
from dsv4_jax.config import ModelConfig
from dsv4_jax.convert.leaf_source import LeafSource
from dsv4_jax.convert.orbax_leaves import StoredLeaf, open_leaves
from dsv4_jax.convert.source import FileSource, Source, about, is_of_mtp, refuse_draft_heads
from dsv4_jax.convert.table import EXPERT
from dsv4_jax.convert.tensor_files import open_tensors
from dsv4_jax.convert.untrusted import explain_failed_search, read_json
from dsv4_jax.errors import InputError
from dsv4_jax.hf_config import without_mtp
from dsv4_jax.hf_storage import UNKNOWN, storage_of
from dsv4_jax.run_config import RunConfig

CONFIG = "config.json"
LARGEST_CONFIG = 1 << 20  # bytes
PARAMS = "params"  # Orbax's folder in what a conversion wrote


class Opened(NamedTuple):
    """A checkpoint that was recognised and checked."""

    source: Source
    title: str  # of the format, for people
    config_json: dict  # a published configuration that came with it; empty for a workdir
    files: tuple[Path, ...]  # files and folders that the source consists of
    step: int | None = None  # of a workdir's checkpoint


def open_checkpoint(folder: Path, *, skip_mtp: bool = False) -> Opened:
    """Open a folder of safetensors, of Orbax's files, or a training's workdir.

    Raises:
      InputError: it is none of them, its configuration is refused, or its tensors are not those of
        the configuration.
    """
    with explain_failed_search(folder):
        if (folder / CHECKPOINTS).is_dir():
            return _open_workdir(folder, skip_mtp)
        if (folder / PARAMS).is_dir():
            return _open_params(folder, skip_mtp)
        return _open_files(folder, skip_mtp)


def _open_files(folder: Path, skip_mtp: bool) -> Opened:
    document = read_json(folder, CONFIG, LARGEST_CONFIG)
    entries = open_tensors(folder)
    if skip_mtp:
        entries = {name: entry for name, entry in entries.items() if not is_of_mtp(name)}
    else:
        with about(str(folder)):
            refuse_draft_heads(entries)
    source = FileSource(folder, entries, _model_config(folder, document, skip_mtp))
    with about(str(folder / CONFIG)):
        _check_declared(document, source)
    files = {entry.path for entry in entries.values()} | {folder / CONFIG}
    return Opened(source, source.naming.title, document, tuple(sorted(files)))


def _open_params(folder: Path, skip_mtp: bool) -> Opened:
    document = read_json(folder, CONFIG, LARGEST_CONFIG)
    config = _model_config(folder, document, skip_mtp)
    source = _leaf_source(config, open_leaves(folder / PARAMS), folder / PARAMS, skip_mtp)
    files = folder / CONFIG, folder / PARAMS
    return Opened(source, "parameters saved by Orbax", document, files)


def _open_workdir(folder: Path, skip_mtp: bool) -> Opened:
    """Open the newest checkpoint of a training; the optimizer's state is left out."""
    document = read_json(folder, CONFIG, LARGEST_CONFIG)
    with about(str(folder / CONFIG)):
        config = RunConfig.from_config_dict(document).model
    steps = committed_steps(folder)
    if not steps:
        raise InputError(f"{folder / CHECKPOINTS}: expected a checkpoint, got none; train first")
    step = max(steps)
    newest = folder / CHECKPOINTS / str(step)
    try:
        check_checkpoint(newest)
    except InputError as error:
        raise InputError(f"{error}; move that folder away to use the one before") from error
    state = newest / "state"
    prefix = "params/"
    leaves = {
        path.removeprefix(prefix): leaf
        for path, leaf in open_leaves(state).items() if path.startswith(prefix)
    }
    source = _leaf_source(config, leaves, state, skip_mtp)
    title = f"training checkpoint of step {step}"
    return Opened(source, title, {}, (folder / CONFIG, state), step)


def _model_config(folder: Path, document: dict, skip_mtp: bool) -> ModelConfig:
    with about(str(folder / CONFIG)):
        return ModelConfig.from_hf(without_mtp(document) if skip_mtp else document)


def _leaf_source(
    config: ModelConfig, leaves: dict[str, StoredLeaf], where: Path, skip_mtp: bool
) -> LeafSource:
    if skip_mtp:
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
        leaves = {path: leaf for path, leaf in leaves.items() if not path.startswith("mtp/")}
    return LeafSource(config, leaves, str(where))


def _check_declared(document: dict, source: Source) -> None:
    """Refuse a config.json that says another format of the experts than they have."""
    declared = storage_of(document)
    expert = next(tensor for tensor in source.tensors if tensor.kind == EXPERT)
    form = source.storage(expert).form
    found = None if form is None else form.name
    if declared is not None and declared.experts not in (None, UNKNOWN, found):
        raise InputError(
            f"expert_dtype: expected {found}, as the experts are stored, got {declared.experts}; "
            "correct the file"
        )
