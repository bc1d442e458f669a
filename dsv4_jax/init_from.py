"""Start a run from the weights and the tokenizer of a trained model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh

from dsv4_jax.config import ModelConfig
from dsv4_jax.convert.load import load_pretrained
from dsv4_jax.convert.table import weights_of
from dsv4_jax.errors import InputError
from dsv4_jax.files import write_atomically
from dsv4_jax.run_config import RunConfig
from dsv4_jax.served_model import ModelFolder
from dsv4_jax.terminal import say
from dsv4_jax.tokenizer import TOKENIZER_FILE


def adopt_model(folder: ModelFolder, config: RunConfig, workdir: Path) -> None:
    """Check that a run trains a model of these weights; give the workdir its tokenizer.

    What the run's config changes of the model is told. A tokenizer that the config names, or that
    the workdir has, stays.

    Raises:
      InputError: the parameters of the two do not have the same names and shapes.
    """
    changes = _changes(folder.config, config.model)
    held, wanted = _shapes(folder.config), _shapes(config.model)
    for path in sorted(held.keys() | wanted.keys()):
        if held.get(path) != wanted.get(path):
            raise InputError(
                f"{path}: expected {_shape(held.get(path))}, as in {folder.path}, got "
                f"{_shape(wanted.get(path))} by the config; take back {' or '.join(changes)}"
            )
    for change in changes:
        say(f"{change}, unlike {folder.path}")
    kept = workdir / TOKENIZER_FILE
    if config.data.tokenizer is None and not kept.exists():
        write_atomically(kept, folder.tokenizer.specification.encode())


def load_weights(folder: ModelFolder, mesh: Mesh | None) -> dict:
    """Read the parameters as a run trains them: in float32, on its mesh.

    Raises:
      InputError: they cannot be read.
    """
    _, params = load_pretrained(
        folder.path, dtype="float32", mesh=mesh, skip_mtp=folder.skip_mtp
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
