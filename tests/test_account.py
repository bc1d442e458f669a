"""Steps compiled for topologies, and what they are said to need."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from compiling import described
from test_sharding import run_config

from dsv4_jax.aot import Account, Exchange, Memory, compile_step, mesh_for
from dsv4_jax.aot_table import as_json, table
from dsv4_jax.compiler import MESH_OPTIONS, compiler_options
from dsv4_jax.devices import GIB, chip_of
from dsv4_jax.errors import InputError
from dsv4_jax.run_config import MeshConfig
from dsv4_jax.sizes import ParamCount, count_params
from dsv4_jax.topology import parse_topology
from dsv4_jax.train_step import as_counted, optimizer_flops

ROOT = Path(__file__).parents[1]
FLAG = "--topology"


def on_mesh(config, **sizes):
    return dataclasses.replace(config, mesh=MeshConfig(**sizes))


@pytest.fixture
def account() -> Account:
    chip = chip_of("TPU v5p")
    return Account(
        devices=2, parameters=ParamCount(total=1_000, active=200, mtp=30),
        memory=Memory(parameters=GIB, optimizer=2 * GIB, activations=3 * GIB, temporaries=4 * GIB,
                      available=10 * GIB),
        tokens=4096, flops=int(chip.flops), compute_seconds=1.0, chip=chip, lower_seconds=3.0,
        compile_seconds=4.0, compiler_memory=GIB, exchanges=(
            Exchange("ragged-all-to-all", True, False, 8, 4 * GIB, 2.0, 1.5),
            Exchange("all-reduce", False, True, 1, GIB, 0.5, 0.0),
        ),
    )


def test_what_follows_from_an_account(account):
    assert account.exposed_seconds == 1.0  # 0.5 s of the one and all of the other
    assert account.step_seconds == 2.0
    assert account.mfu == 0.25  # half of the work for each of two devices, in twice the time
    assert account.memory.fits and account.memory.total == 10 * GIB
    assert not dataclasses.replace(account.memory, temporaries=5 * GIB).fits
    assert account.exchanges[0].hidden_share == 0.75


def test_an_account_as_a_table_and_as_json(account):
    lines = "\n".join(table(account))
    for part in ("1,000", "in all            10.00, fits into 10.00", "MFU 25.0%",
                 "ragged-all-to-all of experts       8     4.000    2.0000     75.0%",
                 "all-reduce, far"):
        assert part in lines
    found = json.loads(json.dumps(as_json(account)))
    assert found["memory"]["fits"] is True and found["mfu"] == 0.25
    assert found["exchanges"][0]["hidden_share"] == 0.75


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_many_devices_get_options_with_a_reason_each(platform):
    options = compiler_options(on_mesh=True, platform=platform, deterministic=False)
    assert options == {x.name: x.value for x in MESH_OPTIONS if x.platform == platform}
    assert compiler_options(platform=platform, deterministic=False) is None
    assert all(x.reason for x in MESH_OPTIONS)


def test_a_mesh_of_another_number_of_devices_is_refused():
    config = on_mesh(run_config("sparse"), data=2, expert=2)
    with pytest.raises(InputError, match="equal to the 8 devices of --topology, got data 2 x") as e:
        mesh_for(config, config.stages[0], parse_topology("v5p:2x2x2", FLAG), FLAG)
    assert "= 4; change the mesh section" in str(e.value)


@pytest.mark.aot
@pytest.mark.parametrize(("text", "sizes"), [
    ("v5p:2x2x2", {"data": 2, "expert": 2, "fsdp": 2}),
    ("v6e:2x2*2", {"data": 2, "expert": 2, "fsdp": 2}),
    ("h100:1x2x4", {"data": 1, "expert": 2, "fsdp": 4}),
])
def test_a_step_is_accounted_for(text, sizes):
    described(text)  # before any other use of the compiler
    config = on_mesh(run_config("sparse", "muon"), **sizes)
    stage = config.stages[0]
    account, program = compile_step(config, stage, parse_topology(text, FLAG), FLAG)
    assert program.startswith("HloModule ")
    assert account.devices == 8 and account.tokens == stage.batch_tokens
    assert account.parameters == count_params(config.model)
    memory = account.memory
    assert memory.fits and memory.temporaries > 0
    # Float32 parameters: at least an eighth of them on each device; Muon keeps one moment of each.
    held = account.parameters.total + account.parameters.mtp
    assert held * 4 / 8 <= memory.parameters < held * 4
    assert memory.optimizer >= held * 4 / 8
    layers = config.model.num_layers + config.model.num_nextn_predict_layers
    channels = (config.model.hc_mult + 1) * config.model.hidden_size
    tokens = stage.batch_tokens / math.prod(sizes.values())
    assert memory.activations == layers * tokens * channels * 4
    of_experts = [exchange for exchange in account.exchanges if exchange.experts]
    assert [exchange.kind for exchange in of_experts] == ["ragged-all-to-all"]
    assert all(0 <= x.hidden <= x.seconds * 1.0001 for x in account.exchanges)
    assert any(x.slow for x in account.exchanges) == (text != "v5p:2x2x2")
    assert account.flops > optimizer_flops(as_counted(config), stage) > 0
    assert 0 < account.mfu < 1


@pytest.mark.aot
def test_a_step_that_does_not_fit_is_refused_in_one_line():
    described("v5e:2x2")
    config = on_mesh(run_config("sparse", hidden_size=2**15, vocab_size=2**20), data=4)
    with pytest.raises(InputError, match=r"into the 15\.\d GiB of a device, got, from the") as e:
        compile_step(config, config.stages[0], parse_topology("v5e:2x2", FLAG), FLAG)
    assert "\n" not in str(e.value)


def aot(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/aot.py", "--config=configs/v4_flash.py", *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.heavy
@pytest.mark.parametrize(("flags", "message"), [
    ([], "--topology: expected a value, got nothing"),
    (["--topology=v5p:4x4x8", "--stage=9"], "--stage: expected a number from 1 to 8"),
    (["--topology=v5p:2x4x4"], r"\.py: --config: expected a multiple of the 128 .* v5p-128 would"),
    (["--topology=v5e:4x4"], "with a kind of v5p, v6e, tpu7x, h100, got 'v5e-16'"),
    (["--topology=v5p:4x4x4", "--config.mesh.expert=8"], "got data 1 x expert 8 .* = 8; change"),
])
def test_what_the_command_refuses(flags, message):
    found = aot(*flags)
    assert found.returncode == 2, found.stderr
    (line,) = found.stderr.strip().splitlines()


    assert re.search(message, line), line


@pytest.mark.aot
def test_tokens_travel_while_others_are_computed_in_the_recipe_for_flash(tmp_path):
    """The whole model and its optimizer at full width, all layers, for 128 chips."""
    found = aot("--topology=v5p:4x4x8", f"--hlo={tmp_path}/program.txt")
    assert found.returncode == 0, found.stderr
    account = json.loads(found.stdout.splitlines()[-1])
    assert account["memory"]["fits"]
    (of_experts,) = [x for x in account["exchanges"] if x["experts"]]
    assert of_experts["hidden_share"] > 0.8
    assert (tmp_path / "program.txt").read_text().startswith("HloModule ")
