"""Open a model to use it: its weights, how they are computed with, and its tokenizer."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.config import PLAIN, ModelConfig, Runtime, check_choice
from dsv4_jax.convert.leaves import leaf_dtype, leaves_of
from dsv4_jax.convert.load import load_pretrained
from dsv4_jax.convert.opening import CONFIG, LARGEST_CONFIG, open_checkpoint
from dsv4_jax.convert.source import Source
from dsv4_jax.convert.untrusted import checked_path, read_json
from dsv4_jax.errors import InputError
from dsv4_jax.rounded_weights import round_weights
from dsv4_jax.run_config import RunConfig, StageConfig
from dsv4_jax.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer

DTYPES = ("float32", "bfloat16")


class ServedModel(NamedTuple):
    """A model with all that it takes to use it."""

    config: ModelConfig
    runtime: Runtime
    params: dict
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A model whose weights are not read yet."""

    path: Path
    config: ModelConfig
    runtime: Runtime
    tokenizer: Tokenizer
    run: RunConfig | None  # that a workdir is of
    stage: StageConfig | None  # that its checkpoint is of
    dtype: str | None  # of all weights; None: as they are stored
    skip_mtp: bool

    def load(self) -> ServedModel:
        """Read the weights and round them as the run does.

        Raises:
          InputError: they cannot be read.
        """
        linears = self.runtime.linears
        stored = None if linears != PLAIN else self.dtype  # a run rounds what is stored
        _, params = load_pretrained(self.path, dtype=stored, skip_mtp=self.skip_mtp)
        params = round_weights(params, self.config, linears)
        if stored != self.dtype:
            params = jax.tree.map(partial(_cast, dtype=self.dtype), params)
        return ServedModel(self.config, self.runtime, params, self.tokenizer)


def _cast(leaf: jax.Array, dtype: str) -> jax.Array:
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def open_model(
    folder: str | os.PathLike, tokenizer: str | os.PathLike | None = None,
    dtype: str | None = None, *, skip_mtp: bool = False,
) -> ServedModel:
    """Open a model: the workdir of a training, or any folder that `load_pretrained` reads.

    Args and errors are those of `check_model`, after which the weights are read.
    """
    return check_model(folder, tokenizer, dtype, skip_mtp=skip_mtp).load()


def check_model(
    folder: str | os.PathLike, tokenizer: str | os.PathLike | None = None,
    dtype: str | None = None, *, skip_mtp: bool = False,
) -> ModelFolder:
    """Check a model's folder and read all of it but the weights.

    A run's CSA is computed as in the stage of its checkpoint, that of other models over the
    selected entries.

    Args:
      tokenizer: a `tokenizer.json`; None: the one that a workdir's run was given, or the folder's.
      dtype: "float32" or "bfloat16", of weights and computation. None: weights as they are stored;
        computed as the run does it, otherwise in the dtype of the head, if it has one of these.
      skip_mtp: leave out the multi-token prediction block.
    Raises:
      InputError: the folder is no checkpoint or lacks a part, or the tokenizer is none of this
        model.
    """
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    path = Path(folder)
    if not path.is_dir():
        raise InputError(
            f"checkpoint: expected the folder of a model, got {str(folder)!r}, which is no folder; "
            "check the path"
        )
    opened = open_checkpoint(path, skip_mtp=skip_mtp)
    source, run, stage = opened.source, None, None
    if opened.step is not None:
        run = RunConfig.from_config_dict(read_json(path, CONFIG, LARGEST_CONFIG))
        stage = run.stages[run.stage_at(opened.step)]
        runtime = dataclasses.replace(run.runtime, remat=False, csa=stage.csa)
    else:
        runtime = Runtime(dtype=_dtype_of_head(source))
    if dtype is not None:
        runtime = dataclasses.replace(runtime, dtype=dtype)
    found = load_tokenizer(
        _tokenizer_path(path, run, tokenizer), vocab_size=source.config.vocab_size
    )
    return ModelFolder(path, source.config, runtime, found, run, stage, dtype, skip_mtp)


def _dtype_of_head(source: Source) -> str:
    stored = {tensor.name: source.storage(tensor) for tensor in source.tensors}
    leaves = leaves_of(source.config, source.tensors)
    head = next(leaf for leaf in leaves if leaf.path == "head")
    return "bfloat16" if leaf_dtype(head, stored) == jnp.bfloat16 else "float32"


def _tokenizer_path(
    folder: Path, run: RunConfig | None, given: str | os.PathLike | None
) -> Path:
    """Return where the tokenizer is: a run that was given one has no other."""
    if given is None and run is not None:
        given = run.data.tokenizer
    if given is None:
        if not os.path.lexists(folder / TOKENIZER_FILE):
            raise InputError(
                f"{folder}: expected a {TOKENIZER_FILE}, got none; copy the file there, or add "
                "--tokenizer=FILE (to train: --config.data.tokenizer=FILE)"
            )
        return checked_path(folder, TOKENIZER_FILE)
    if not Path(given).is_file():
        raise InputError(
            f"tokenizer: expected a {TOKENIZER_FILE}, got {str(given)!r}, which is no file; "
            "add --tokenizer=FILE (to train: --config.data.tokenizer=FILE)"
        )
    return Path(given)
