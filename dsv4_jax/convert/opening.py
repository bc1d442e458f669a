"""Find out what a checkpoint's folder is, and open it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from dsv4_jax.config import ModelConfig
from dsv4_jax.convert.leaf_source import LeafSource
from dsv4_jax.convert.orbax_leaves import StoredLeaf, open_leaves
from dsv4_jax.convert.source import FileSource, Source, about
from dsv4_jax.convert.table import EXPERT
from dsv4_jax.convert.tensor_files import checked_path, parse_json
from dsv4_jax.errors import InputError
from dsv4_jax.hf_write import UNKNOWN, storage_of
from dsv4_jax.run_config import RunConfig

CONFIG = "config.json"
PARAMS = "params"  # Orbax's folder in what a conversion wrote
CHECKPOINTS = "checkpoints"  # in the workdir of a training


class Opened(NamedTuple):
    """A checkpoint that was recognised and checked."""

    source: Source
    title: str  # of the format, for people
    config_json: dict  # a published configuration that came with it; empty for a workdir


def open_checkpoint(folder: Path, *, skip_mtp: bool = False) -> Opened:
    """Open a folder of safetensors, of Orbax's files, or a training's workdir.

    Raises:
      InputError: it is none of them, its configuration is refused, or its tensors are not those of
        the configuration.
    """
    if (folder / CHECKPOINTS).is_dir():
        return _open_workdir(folder, skip_mtp)
    path = checked_path(folder, CONFIG)
    document = parse_json(path, path.read_bytes())
    config = ModelConfig.from_hf(folder)
    if (folder / PARAMS).is_dir():
        source = _leaf_source(config, open_leaves(folder / PARAMS), folder / PARAMS, skip_mtp)
        return Opened(source, "parameters saved by Orbax", document)
    source = FileSource(folder, config, skip_mtp=skip_mtp)
    with about(str(path)):
        _check_declared(document, source)
    return Opened(source, source.naming.title, document)


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


def _leaf_source(
    config: ModelConfig, leaves: dict[str, StoredLeaf], where: Path, skip_mtp: bool
) -> LeafSource:
    if skip_mtp:
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
        leaves = {path: leaf for path, leaf in leaves.items() if not path.startswith("mtp/")}
    return LeafSource(config, leaves, str(where))


def _open_workdir(folder: Path, skip_mtp: bool) -> Opened:
    """Open the newest checkpoint of a training; the optimizer's state is left out."""
    path = checked_path(folder, CONFIG)
    config = RunConfig.from_config_dict(parse_json(path, path.read_bytes())).model
    steps = [int(p.name) for p in (folder / CHECKPOINTS).iterdir() if p.name.isdecimal()]
    if not steps:
        raise InputError(f"{folder / CHECKPOINTS}: expected a checkpoint, got none; train first")
    state = folder / CHECKPOINTS / str(max(steps)) / "state"
    prefix = "params/"
    leaves = {
        path.removeprefix(prefix): leaf
        for path, leaf in open_leaves(state).items() if path.startswith(prefix)
    }
    source = _leaf_source(config, leaves, state, skip_mtp)
    return Opened(source, f"training checkpoint of step {max(steps)}", {})
