"""What all parts of a training run share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from dsv4_jax.data import Batch
from dsv4_jax.model import param_shapes
from dsv4_jax.params import shardings_of
from dsv4_jax.run_config import CHAT, RunConfig, StageConfig
from dsv4_jax.served_model import ModelFolder
from dsv4_jax.sharding import batch_sharding, make_mesh
from dsv4_jax.sizes import count_params
from dsv4_jax.terminal import say, timed
from dsv4_jax.tokenized import TokenizedCorpus, baseline_bits_per_byte, prepare_corpus


@dataclasses.dataclass(frozen=True)
class Run:
    """What all parts of a run share."""

    config: RunConfig
    workdir: Path
    mesh: Mesh | None  # None on one device
    corpus: TokenizedCorpus
    started: float  # when, by time.time()
    profile_steps: tuple[int, int] | None
    wandb_project: str | None
    origin: ModelFolder | None  # with whose weights it starts

    @functools.cached_property
    def baselines(self) -> dict[str, float]:
        """What general compressors need for the held-out text, in bits per byte."""
        return baseline_bits_per_byte(self.corpus.held_out_text)

    def place(self, batch: Batch) -> dict[str, jax.Array]:
        """Put this host's part of a batch on its devices."""
        if self.mesh is None:
            return jax.device_put(batch)
        sharding = batch_sharding(self.mesh, len(batch["tokens"]) * jax.process_count())
        return {
            name: jax.make_array_from_process_local_data(sharding, array)
            for name, array in batch.items()
        }


def corpus_of(config: RunConfig, workdir: Path) -> TokenizedCorpus:
    """Read the source of a run, and tell how much it is."""
    with timed("reading, tokenizing and encoding the text"):
        corpus = prepare_corpus(config.data, vocab_size=config.model.vocab_size, workdir=workdir)
    units = "examples" if config.data.format == CHAT else "documents"
    say(
        f"data: {len(corpus.train.tokens):,} tokens in {len(corpus.train):,} {units} to train on, "
        f"{len(corpus.held_out_text):,} bytes held out"
    )
    return corpus


def mesh_of(config: RunConfig) -> Mesh | None:
    """Return the mesh of a run; a run on one device needs none."""
    if config.mesh.size == 1:
        return None
    mesh = make_mesh(config.mesh.sizes)
    check_mesh(config, mesh, config.stages)
    return mesh


def check_mesh(config: RunConfig, mesh: Mesh, stages: Sequence[StageConfig]) -> None:
    """Raise an InputError unless rows of micro-batches, and the model's axes, fall in equal parts.
    """
    for stage in stages:
        batch_sharding(mesh, stage.rows // stage.accumulation)
    shardings_of(param_shapes(config.model), mesh, config.mesh.layout)


def announce_model(config: RunConfig, mesh: Mesh | None) -> None:
    """Tell the size of a run's model, and where it is trained."""
    size = count_params(config.model)
    used = 1 if mesh is None else mesh.size
    say(
        f"model: {size.total:,} parameters, {size.active:,} active per token, {size.mtp:,} more "
        f"for multi-token prediction; on {used} of {len(jax.devices())} "
        f"{jax.default_backend()} devices"
    )
