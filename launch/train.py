"""Train a model.

    python launch/train.py --config=configs/tiny.py --workdir=DIR [--config.train.seed=1 ...]

With --profile_steps=10:13 a trace of these steps is written to DIR/profile, for xprof.

With --init_from=DIR the run starts with the weights, the tokenizer and, where the config leaves it
open, the model of a checkpoint: the workdir of another training, or any folder that
launch/convert.py reads.

The same command again goes on from the newest checkpoint of the workdir.
"""

from __future__ import annotations

from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from dsv4_jax import cli
from dsv4_jax.init_from import model_of
from dsv4_jax.profile import parse_steps
from dsv4_jax.run_config import RunConfig
from dsv4_jax.train import train

CONFIG = config_flags.DEFINE_config_file("config", None, "the run: a file of configs/")
WORKDIR = flags.DEFINE_string("workdir", None, "folder for all that the run writes")
WANDB = flags.DEFINE_string(
    "wandb_project", None, "project of Weights & Biases to log to, too (needs the extra wandb)"
)
INIT_FROM = flags.DEFINE_string(
    "init_from", None, "workdir of a training, or a folder of safetensors or of Orbax's files, "
    "whose model is trained on"
)
PROFILE = flags.DEFINE_string("profile_steps", None, "steps to trace, as FIRST:LAST")


def main() -> None:
    cli.require(CONFIG, WORKDIR)
    model, init_from = None, INIT_FROM.value
    if init_from is not None:
        model = model_of(init_from, WORKDIR.value, CONFIG.value)
    config = RunConfig.from_config_dict(CONFIG.value, model)
    profile_steps = parse_steps(PROFILE.value, "--profile_steps")
    if jax.config.jax_compilation_cache_dir is None:
        # A run that goes on need not compile again.
        jax.config.update("jax_compilation_cache_dir", str(Path(WORKDIR.value, "compiled")))
    train(
        config, WORKDIR.value, profile_steps=profile_steps, wandb_project=WANDB.value,
        init_from=init_from,
    )


if __name__ == "__main__":
    cli.run(main)
