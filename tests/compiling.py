"""Compile programs that run once or twice: compiling them is what takes the time."""

from __future__ import annotations

import jax

QUICK = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False  # jax 0.12 has the newer emitters alone


def quick_jit(function, **options):
    """Compile with few optimisations."""
    return jax.jit(function, compiler_options=QUICK, **options)
