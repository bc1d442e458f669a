"""Compile programs that run once or twice, where compiling takes the time, or never."""

from __future__ import annotations

import jax

QUICK = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False  # jax 0.12 has the newer emitters alone


def quick_jit(function, **options):
    """Compile with few optimisations."""
    return jax.jit(function, compiler_options=QUICK, **options)


def described(text: str) -> list[jax.Device]:
    """Return the devices that a topology names.

    Who first uses the TPU compiler in a process decides what it leaves behind. Tests of kernels
    read that, and may come later.
    """
    from dsv4_jax.topology import describe, parse_topology
    from pallas_kernels import aot

    aot.described_device("v5p")
    return describe(parse_topology(text, "--topology"), "--topology")
