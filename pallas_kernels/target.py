"""The platform that a program is made for, which need not be the one that makes it."""

from __future__ import annotations

import contextlib

import jax
from jax.sharding import AbstractDevice, AbstractMesh

CPU, GPU, TPU = "cpu", "gpu", "tpu"
PLATFORMS = {"cpu": CPU, "gpu": GPU, "cuda": GPU, "rocm": GPU, "tpu": TPU}  # JAX's names for them


def target_platform() -> str:
    """Return "cpu", "gpu" or "tpu": of the mesh that is set, else of the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return PLATFORMS[jax.default_backend() if device is None else device.platform]


def compiling_for(device: jax.Device) -> contextlib.AbstractContextManager:
    """Trace for a device that is described only, as those of a topology are.

    A mesh of such devices, set by `jax.set_mesh`, does the same.
    """
    described = AbstractDevice(
        device_kind=device.device_kind, platform=device.platform,
        num_cores=None,
    )
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=described))
