"""What `--topology` names is read, refused or described."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
from compiling import described

from dsv4_jax import topology as topologies
from dsv4_jax.devices import chip_of
from dsv4_jax.errors import InputError
from dsv4_jax.topology import Topology, describe, parse_topology


@pytest.mark.parametrize("text, devices, per_slice, per_host", [
    ("v5p:16x16x16", 4096, 4096, 4),
    ("v6e:16x16*16", 4096, 256, 4),
    ("v5e:16x16", 256, 256, 4),
    ("tpu7x:8x16x16", 4096, 4096, 8),  # a chip is two devices
    ("tpu7x:2x2x2*2", 32, 16, 8),
    ("h100:1x32x8", 256, 8, 8),
    ("b200:2x8x4", 64, 4, 4),
])
def test_topologies_are_read(text, devices, per_slice, per_host):
    topology = parse_topology(text, "--topology")
    kind, _, shape = text.partition(":")
    shape, _, slices = shape.partition("*")
    assert topology == Topology(kind, tuple(map(int, shape.split("x"))), int(slices or 1))
    assert topology.devices == devices
    assert topology.devices_per_slice == per_slice
    assert topology.devices_per_host == per_host


@pytest.mark.parametrize("text, expected", [
    ("", "a kind of v5e, v5p, v6e, tpu7x, h100, b200, got ''"),
    ("v5p", r"expected v5p:AxBxC with 3 whole numbers above 0"),
    ("v7:2x2x2", "a kind of v5e, v5p"),
    ("H100:1x1x8", "a kind of v5e, v5p"),
    ("v5p:16x16", "expected v5p:AxBxC with 3 whole numbers above 0, got 'v5p:16x16'"),
    ("v5e:4x4x4", "expected v5e:AxB with 2 whole numbers"),
    ("h100:32x8", "expected h100:AxBxC with 3"),
    ("v5e:0x4", "above 0"),
    ("v5e:04x4", "above 0"),
    ("v5e:4x-4", "above 0"),
    ("v5e:4x4.0", "above 0"),
    ("v5e:4xfour", "above 0"),
    ("v5e:4x4x", "above 0"),
    ("v5e:4x٤", "above 0"),  # a digit, of another script
    ("v5e: 4x4", "above 0"),
    ("v5e:4x4\n", "above 0"),
    ("v6e:16x16*0", "above 0"),
    ("v6e:16x16*", "above 0"),
    ("v6e:16x16*2*2", "above 0"),
    ("v5e:4x" + "9" * 100_000, "above 0"),
    ("h100:1x32x8*2", r"\*N after a shape of TPUs only"),
])
def test_what_is_no_topology_is_refused_in_one_line(text, expected):
    with pytest.raises(InputError, match=expected) as caught:
        parse_topology(text, "--topology")
    message = str(caught.value)
    assert message.startswith("--topology: expected ") and "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize("kind, package", [
    ("v5p", "libtpu"), ("h100", "jax-cuda13-plugin and nvidia-cuda-nvcc"),
])
def test_compilers_that_are_not_installed_are_named(kind, package, monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    topology = parse_topology(f"{kind}:2x2x2", "--topology")
    with pytest.raises(InputError, match=rf"got no package {package}; .*dsv4_jax\[aot\]"):
        describe(topology, "--topology")


@pytest.mark.aot
@pytest.mark.parametrize("text", [
    "v5p:2x2x2", "v5e:4x4", "v6e:4x4*2", "tpu7x:2x2x2*2", "h100:1x4x8", "b200:1x2x8",
])
def test_devices_are_described(text):
    topology, devices = parse_topology(text, "--topology"), described(text)
    assert len(devices) == len(set(devices)) == topology.devices
    hosts = {device.process_index for device in devices}
    assert len(hosts) * topology.devices_per_host == topology.devices
    assert chip_of(devices[0].device_kind) == topology.chip is not None
    if topology.slices > 1:
        indices = [device.slice_index for device in devices]
        assert indices == sorted(indices)
        assert indices.count(0) == topology.devices_per_slice


@pytest.mark.aot
def test_a_shape_that_the_compiler_refuses_is_told():
    with pytest.raises(InputError, match="that the compiler knows, got v5p:3x5x7: .*divisible"):
        described("v5p:3x5x7")


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra aot")
def test_the_tpu_compiler_is_silent():
    code = (
        "from dsv4_jax.topology import describe, parse_topology\n"
        "print(len(describe(parse_topology('v5p:2x2x2', '--topology'), '--topology')))\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean
    )
    assert done.stdout == "8\n" and done.stderr == ""
