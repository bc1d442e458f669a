"""Start a run from the weights and the tokenizer of a trained model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dsv4_jax.checkpoint import committed_steps
from dsv4_jax.config import ModelConfig
from dsv4_jax.convert.load import load_pretrained
from dsv4_jax.convert.opening import CONFIG, LARGEST_CONFIG, open_checkpoint
from dsv4_jax.convert.source import about
from dsv4_jax.convert.table import weights_of
from dsv4_jax.convert.untrusted import read_json
from dsv4_jax.errors import InputError
from dsv4_jax.files import write_atomically
from dsv4_jax.run_config import RunConfig
from dsv4_jax.served_model import ModelFolder, check_model
from dsv4_jax.sharding import POD
from dsv4_jax.terminal import say
from dsv4_jax.tokenizer import TOKENIZER_FILE


def model_of(
    folder: str | Path, workdir: str | Path, config: ConfigDict | Mapping
) -> ModelConfig:
    """Return the model for what a run's config leaves open.

    It is that of the folder, without a prediction block if the config sets
    `num_nextn_predict_layers` to 0. A run that has a checkpoint has a model of its own, and needs
    the folder no more.

    Raises:
      InputError: the folder is no checkpoint.
    """
    if committed_steps(Path(workdir)):
        saved = read_json(Path(workdir), CONFIG, LARGEST_CONFIG)
        with about(str(Path(workdir, CONFIG))):
            return RunConfig.from_config_dict(saved).model
    if not Path(folder).is_dir():
        raise InputError(
            f"--init_from: expected the folder of a model, got {str(folder)!r}, which is no "
            "folder; check the path"
        )
    section = config.get("model")
    given = section if isinstance(section, (ConfigDict, Mapping)) else {}
    skip_mtp = given.get("num_nextn_predict_layers") == 0
    return open_checkpoint(Path(folder), skip_mtp=skip_mtp).source.config


def adopt_model(folder: str | Path, config: RunConfig, workdir: Path) -> ModelFolder:
    """Check that a run trains a model of the folder's weights; give the workdir its tokenizer.

    What the run's config changes of the model is told. A tokenizer that the config names is used
    instead; one that an earlier try left in the workdir is replaced.

    Raises:
      InputError: the folder is no checkpoint, or its parameters and those of the run do not have
        the same names and shapes.
    """
    skip_mtp = config.model.num_nextn_predict_layers == 0
    found = check_model(folder, config.data.tokenizer, skip_mtp=skip_mtp)
    changes = _changes(found.config, config.model)
    held, wanted = _shapes(found.config), _shapes(config.model)
    for path in sorted(held.keys() | wanted.keys()):
        if held.get(path) != wanted.get(path):
            raise InputError(
                f"{path}: expected {_shape(held.get(path))}, as in {folder}, got "
                f"{_shape(wanted.get(path))} by the config; take back {' or '.join(changes)}"
            )
    for change in changes:
        say(f"{change}, unlike {folder}")
    if config.data.tokenizer is None:
        write_atomically(workdir / TOKENIZER_FILE, found.tokenizer.specification.encode())
    return found


def load_weights(folder: ModelFolder, mesh: Mesh | None, layout: str = POD) -> dict:
    """Read the parameters as a run trains them: in float32, on its mesh.

    Raises:
      InputError: they cannot be read.
    """
    _, params = load_pretrained(
        folder.path, dtype="float32", mesh=mesh, layout=layout, skip_mtp=folder.skip_mtp
    )
    return jax.block_until_ready(params)


def _changes(before: ModelConfig, now: ModelConfig) -> list[str]:
    values = ((f.name, getattr(before, f.name), getattr(now, f.name))
              for f in dataclasses.fields(ModelConfig))
    return [f"model.{name}={new!r} for {old!r}" for name, old, new in values if old != new]


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {path: weight.value.shape for path, weight in weights_of(config).items()}


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no such weight" if shape is None else f"the shape {shape}"
