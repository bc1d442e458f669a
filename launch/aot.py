"""Compile a run's training step for a topology that is not here, and account for what it needs.

    python launch/aot.py --config=configs/v4_flash.py --topology=v5p:4x4x8 [--stage=1]

A topology is KIND:SHAPE, and *N behind it stands for N slices. The mesh is that of the config or,
if this names none, of the config's recipe for the kind. Prints a table and, as the last line, JSON.
Needs the extra `aot`, and no accelerator.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from dsv4_jax import cli
from dsv4_jax.aot import compile_step
from dsv4_jax.aot_table import as_json, table
from dsv4_jax.files import explain_failed_write
from dsv4_jax.run_config import RunConfig
from dsv4_jax.terminal import say
from dsv4_jax.topology import EXAMPLES, parse_topology

CONFIG = config_flags.DEFINE_config_file("config", None, "the run: a file of configs/")
TOPOLOGY = flags.DEFINE_string("topology", None, f"the devices, such as {EXAMPLES}")
STAGE = flags.DEFINE_integer("stage", 1, "of the run, from 1")
HLO = flags.DEFINE_string("hlo", None, "file for the text of the compiled program")


_M_ARENA_MAX = -8  # of glibc's mallopt


def main() -> None:
    cli.require(CONFIG, TOPOLOGY)
    _keep_memory_small()
    topology = parse_topology(TOPOLOGY.value, "--topology")
    config = RunConfig.from_config_dict(cli.config_for(topology.kind, topology.devices))
    stage = config.stage(STAGE.value, "--stage")
    account, text = compile_step(config, stage, topology, "--topology")
    if HLO.value:
        with explain_failed_write(Path(HLO.value), "--hlo"):
            Path(HLO.value).write_text(text)
    for line in table(account):
        say(line)
    say(json.dumps({"topology": TOPOLOGY.value, "mesh": config.mesh.sizes} | as_json(account)))


def _keep_memory_small() -> None:
    """Let the compiler's threads share what glibc allocates: a sixth less in all."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other systems have none
    if mallopt:
        mallopt(_M_ARENA_MAX, 2)


if __name__ == "__main__":
    cli.run(main)
