"""Options of the compiler that make whole programs faster than its defaults do."""

from __future__ import annotations

import jax

# On CPU XLA hands some products and sums to the library YNNPACK. Its sums over leading axes, such
# as the gradient of a norm's weight, are slow in jax 0.10: without them a training step took
# 0.60 s instead of 0.71 s (benchmarks/train_step.py at 4096 tokens). In jax 0.12 they are not.
_PRODUCTS_ONLY = {
    "xla_cpu_experimental_ynn_fusion_type":
        "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}


def inference_options() -> dict[str, str] | None:
    """Return what to pass to `jax.jit` as `compiler_options` for prefill and decode.

    On CPU the library's sums and elementwise products would round by the size of an array, and so
    a row by the batch that it is in.
    """
    return _PRODUCTS_ONLY if jax.default_backend() == "cpu" else None


def compiler_options() -> dict[str, str] | None:
    """Return what to pass to `jax.jit` as `compiler_options` for steps and evaluations."""
    if jax.default_backend() == "cpu" and jax.__version_info__ < (0, 11):
        return _PRODUCTS_ONLY
    return None
