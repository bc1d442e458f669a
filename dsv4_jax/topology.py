"""Devices that are described, not present: what `--topology` names, to compile for."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import topologies

import pallas_kernels
from dsv4_jax.devices import Chip, chip_of
from dsv4_jax.errors import InputError, shown

GPUS = ("h100", "b200")  # described in pallas_kernels/gpus
# Axes of the network, and devices of a chip. Hosts have 2 x 2 chips, libtpu's default.
TPUS = {"v5e": (2, 1), "v5p": (3, 1), "v6e": (2, 1), "tpu7x": (3, 2)}
KINDS = (*TPUS, *GPUS)
# What JAX calls their devices.
DEVICE_KINDS = {
    "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x",
    "h100": "NVIDIA H100", "b200": "NVIDIA B200",
}
EXAMPLES = "v5p:16x16x16, v6e:16x16*16 (16 slices) or h100:1x32x8 (partitions, hosts, GPUs of each)"
_CHIPS_PER_HOST = 4

# Read when the TPU compiler is first used in a process. The first two let several processes use it
# where no TPU is; without the others it complains on the terminal that it is on no TPU host.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # of this machine; whichever, if any: no TPU is looked for
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


class Topology(NamedTuple):
    """A number of devices and how they are connected."""

    kind: str  # one of KINDS
    shape: tuple[int, ...]  # chips along the axes of a slice; partitions, hosts and GPUs of each
    slices: int  # of this shape; 1 for GPUs

    @property
    def chip(self) -> Chip:
        """What a device can do at most."""
        return chip_of(DEVICE_KINDS[self.kind])

    @property
    def devices_per_slice(self) -> int:
        """How many devices the fast network connects: those of a slice, or of a host of GPUs."""
        if self.kind in GPUS:
            return self.shape[-1]
        return math.prod(self.shape) * TPUS[self.kind][1]

    @property
    def devices_per_host(self) -> int:
        """How many devices a host has."""
        if self.kind in GPUS:
            return self.shape[-1]
        return _CHIPS_PER_HOST * TPUS[self.kind][1]

    @property
    def devices(self) -> int:
        """How many devices there are in all."""
        if self.kind in GPUS:
            return math.prod(self.shape)
        return self.devices_per_slice * self.slices


def parse_topology(text: str, flag: str) -> Topology:
    """Read `KIND:SHAPE`, or `KIND:SHAPE*N` for N slices of TPUs.

    Args:
      flag: that the text is the value of.
    Raises:
      InputError: it is none of these, or of a kind or a number of axes that do not exist.
    """
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise InputError(
            f"{flag}: expected KIND:SHAPE with a kind of {', '.join(KINDS)}, got {shown(text)}; "
            f"give one such as {EXAMPLES}"
        )
    axes = 3 if kind in GPUS else TPUS[kind][0]
    # As many digits as no shape has: int() of millions of them takes long.
    found = re.fullmatch(r"([1-9][0-9]{0,5}(?:x[1-9][0-9]{0,5})*)(?:\*([1-9][0-9]{0,5}))?", rest)
    shape = tuple(map(int, found[1].split("x"))) if found else ()
    if len(shape) != axes:
        numbers = "x".join("ABC"[:axes])
        raise InputError(
            f"{flag}: expected {kind}:{numbers} with {axes} whole numbers above 0, got "
            f"{shown(text)}; give one such as {EXAMPLES}"
        )
    if kind in GPUS and found[2]:
        raise InputError(
            f"{flag}: expected *N after a shape of TPUs only, got {shown(text)}; the first number "
            "of a shape of GPUs counts its partitions"
        )
    return Topology(kind, shape, int(found[2] or 1))


def describe(topology: Topology, flag: str) -> list[jax.Device]:
    """Return the devices, slice by slice, for which JAX can then compile.

    Sets variables of the environment that the TPU compiler reads when it is first used, unless
    they are set.

    Args:
      flag: that the topology is the value of.
    Raises:
      InputError: the compilers are not installed, or refuse the shape.
    """
    _check_installed(topology.kind, flag)
    shape = "x".join(map(str, topology.shape))
    try:
        if topology.kind in GPUS:
            devices = _describe_gpus(topology.kind, shape)
        else:
            devices = _describe_tpus(f"{topology.kind}:{shape}", topology.slices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{flag}: expected a shape that the compiler knows, got {topology.kind}:{shape}: "
            f"{reason}; give one such as {EXAMPLES}"
        ) from None
    # Their numbers grow from slice to slice.
    return sorted(devices, key=lambda device: device.id) if topology.slices > 1 else devices


def _describe_gpus(kind: str, shape: str) -> list[jax.Device]:
    description = Path(pallas_kernels.__file__).parent / "gpus" / f"{kind}.txtpb"
    described = topologies.get_topology_desc(
        platform="cuda",
        topology_name=kind,
        target_config=description.read_text(),
        topology=shape,
    )
    return list(described.devices)


def _describe_tpus(name: str, slices: int) -> list[jax.Device]:
    for variable, value in _TPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=name, num_slices=slices
    )
    return list(described.devices)


def _check_installed(kind: str, flag: str) -> None:
    if kind in GPUS:
        needed = {"jax_cuda13_plugin": "jax-cuda13-plugin", "nvidia": "nvidia-cuda-nvcc"}
    else:
        needed = {"libtpu": "libtpu"}
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        packages = " and ".join(needed[name] for name in missing)
        raise InputError(
            f"{flag}: expected compilers for {kind}, got no package {packages}; install them by "
            "pip install 'dsv4_jax[aot]'"
        )
