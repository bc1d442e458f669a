"""Steps estimated from shapes, beside what compilers and counts say of them."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_sharding import run_config

from dsv4_jax.cli import read_config_file
from dsv4_jax.devices import chip_of
from dsv4_jax.errors import InputError
from dsv4_jax.estimate import Part, Sent, estimate
from dsv4_jax.estimate_table import as_json, table
from dsv4_jax.run_config import MeshConfig, RunConfig
from dsv4_jax.topology import DEVICE_KINDS, GPUS, KINDS, Topology, parse_topology
from dsv4_jax.train_step import as_counted, optimizer_flops

ROOT = Path(__file__).parents[1]
FLAG = "--topology"
# What benchmarks/pods.py had compiled.
PODS = json.loads((ROOT / "benchmarks" / "results" / "pods.json").read_text())
STAGE = 3  # index of the stage there


@functools.cache
def of_pod(name: str):
    model, _, text = name.partition(":")
    topology = parse_topology(text, FLAG)
    cluster = f"{topology.kind}-{topology.devices}"
    file = ROOT / "configs" / f"v4_{model}.py"
    config = RunConfig.from_config_dict(read_config_file(f"{file}:{cluster}"))
    return estimate(config, config.stages[STAGE], topology, FLAG)


@pytest.mark.parametrize("name", PODS)
def test_memory_is_within_a_tenth_of_the_compilers(name):
    compiled, memory = PODS[name]["memory"], of_pod(name).memory
    assert memory.total == pytest.approx(compiled["total"], rel=0.1)
    for kind in ("parameters", "optimizer", "activations"):
        assert getattr(memory, kind) == compiled[kind]


@pytest.mark.parametrize("name", PODS)
def test_what_is_sent_is_near_what_the_compiled_program_sends(name):
    """The compiler's is less for tokens, more for reduce-scatters that it makes all-reduces."""
    sent = sum(x.bytes for x in of_pod(name).sent)
    assert sent == pytest.approx(sum(x["bytes"] for x in PODS[name]["exchanges"]), rel=0.15)


def test_products_are_those_that_are_counted():
    """Short rows: of attention the counted program computes what is masked, too."""
    config = as_counted(run_config("dense", "muon"))
    stage = config.stages[0]
    found = estimate(config, stage, Topology("v5p", (1, 1, 1), 1), FLAG)
    parts = {part.name: part.flops for part in found.parts}
    assert parts["optimizer"] == pytest.approx(optimizer_flops(config, stage), rel=1e-6)
    assert found.flops == pytest.approx(sum(parts.values()))


def test_a_recomputing_step_counts_no_more():
    config = run_config("sparse")
    plain, again = (
        estimate(
            dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, remat=remat)),
            config.stages[0], Topology("v5p", (1, 1, 1), 1), FLAG,
        ) for remat in (False, True)
    )
    assert again.flops == pytest.approx(plain.flops)
    assert again.compute_seconds > plain.compute_seconds


@pytest.mark.parametrize(("text", "sizes", "far"), [
    ("v5p:2x2x2", {"data": 2, "expert": 2, "fsdp": 2}, set()),
    ("v6e:2x2*2", {"data": 2, "expert": 2, "fsdp": 2}, {"copies of the model"}),
    ("h100:1x2x4", {"expert": 2, "fsdp": 2, "tensor": 2},
     {"tokens to experts", "dense weights along expert"}),
])
def test_what_is_sent_far(text, sizes, far):
    config = dataclasses.replace(run_config("sparse"), mesh=MeshConfig(**sizes))
    found = estimate(config, config.stages[0], parse_topology(text, FLAG), FLAG)
    assert {x.name for x in found.sent if x.slow} == far
    assert all(x.bytes >= 0 for x in found.sent)


def test_a_part_takes_the_longer_of_its_products_and_its_memory():
    chip = chip_of("TPU v5p")
    assert Part("a", 3 * chip.flops, 2 * chip.memory_speed).seconds(chip) == pytest.approx(3)
    assert Part("a", chip.flops, 2 * chip.memory_speed).seconds(chip) == pytest.approx(2)
    assert Sent("a", False, chip.fast_network).seconds(chip) == pytest.approx(1)
    assert Sent("a", True, chip.slow_network).seconds(chip) == pytest.approx(1)


def test_what_follows_from_an_estimate():
    found = of_pod("pro:v5p:8x8x8")
    assert found.step_seconds == max(found.compute_seconds, found.network_seconds)
    assert found.tokens_per_day == pytest.approx(found.tokens / found.step_seconds * 86_400)
    hours = found.device_hours(found.tokens)  # of one step
    assert hours == pytest.approx(found.step_seconds * 512 / 3600)
    assert 0 < found.mfu < 1 and found.bottleneck == "routed experts"
    lines = "\n".join(table(found))
    for words in ("GFLOP for a token", "tokens a day", "device-hours for 33T", "optimizer"):
        assert words in lines
    assert json.loads(json.dumps(as_json(found)))["memory"]["fits"] is True


def test_every_kind_of_device_is_known():
    assert set(DEVICE_KINDS) == set(KINDS) >= set(GPUS)
    assert all(chip_of(kind) for kind in DEVICE_KINDS.values())


def test_a_stage_of_the_indexers_is_refused():
    config = run_config("indexer")
    with pytest.raises(InputError, match="expected one that trains the model"):
        estimate(config, config.stages[0], parse_topology("v5p:1x1x1", FLAG), FLAG)


def test_another_number_of_devices_is_refused():
    config = run_config("sparse")
    with pytest.raises(InputError, match="equal to the 8 devices of --topology, got data 1 x"):
        estimate(config, config.stages[0], parse_topology("v5p:2x2x2", FLAG), FLAG)


@pytest.mark.heavy
def test_the_command_prints_a_table_and_json():
    command = [sys.executable, "launch/estimate.py", "--config=configs/v4_flash.py",
               "--topology=v6e:16x16*4", "--stage=4", "--config.runtime.expert_waves=3"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    account = json.loads(found.stdout.splitlines()[-1])
    assert account["mesh"] == {"data": 4, "expert": 128, "fsdp": 2, "tensor": 1}
