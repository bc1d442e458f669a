"""The platform that a program is made for, which need not be the one that makes it."""

from __future__ import annotations

import contextlib

import jax
from jax.sharding import AbstractDevice, AbstractMesh

CPU, GPU, TPU = "cpu", "gpu", "tpu"
PLATFORMS = {"gpu": GPU, "cuda": GPU, "rocm": GPU, "tpu": TPU}  # JAX's names; all others: CPU
# Kinds of devices, by how their names begin, that kernels are compiled for by the tests, and larger
# ones of the same architecture.
SUPPORTED = (
    "NVIDIA H100", "NVIDIA H200", "NVIDIA GH200", "NVIDIA B200", "NVIDIA GB200", "TPU v5", "TPU v6",
    "TPU7x",
)


def target_platform() -> str:
    """Return "cpu", "gpu" or "tpu"."""
    return PLATFORMS.get(_target().platform, CPU)


def is_supported() -> bool:
    """Say whether kernels are compiled and tested for the kind of device."""
    return _target().device_kind.startswith(SUPPORTED)


def _target() -> AbstractDevice | jax.Device:
    """Return a device of the mesh that is set, else the default device."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return described
    default = jax.config.jax_default_device
    return default if isinstance(default, jax.Device) else jax.devices(default)[0]


def compiling_for(device: jax.Device) -> contextlib.AbstractContextManager:
    """Trace for a device that is described only, as those of a topology are.

    A mesh of such devices, set by `jax.set_mesh`, does the same.
    """
    described = AbstractDevice(
        device_kind=device.device_kind, platform=device.platform,
        num_cores=None,
    )
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=described))
