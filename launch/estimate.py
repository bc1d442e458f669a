"""Estimate a run's training step on a topology from the model's shapes, in seconds.

    python launch/estimate.py --config=configs/v4_pro.py --topology=v5p:16x16x16 [--stage=4]

Takes the same topologies, and the same meshes and recipes, as launch/aot.py, and needs no compiler.
Prints a table and, as the last line, JSON.
"""

from __future__ import annotations

import json

from absl import flags
from ml_collections import config_flags

from dsv4_jax import cli
from dsv4_jax.estimate import estimate
from dsv4_jax.estimate_table import as_json, table
from dsv4_jax.run_config import RunConfig
from dsv4_jax.terminal import say
from dsv4_jax.topology import EXAMPLES, parse_topology

CONFIG = config_flags.DEFINE_config_file("config", None, "the run: a file of configs/")
TOPOLOGY = flags.DEFINE_string("topology", None, f"the devices, such as {EXAMPLES}")
STAGE = flags.DEFINE_integer("stage", 1, "of the run, from 1")


def main() -> None:
    cli.require(CONFIG, TOPOLOGY)
    topology = parse_topology(TOPOLOGY.value, "--topology")
    config = RunConfig.from_config_dict(cli.config_for(topology.kind, topology.devices))
    found = estimate(config, config.stage(STAGE.value, "--stage"), topology, "--topology")
    for line in table(found):
        say(line)
    say(json.dumps({"topology": TOPOLOGY.value, "mesh": config.mesh.sizes} | as_json(found)))


if __name__ == "__main__":
    cli.run(main)
