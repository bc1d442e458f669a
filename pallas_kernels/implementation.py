"""Which implementation of an operation runs: the plain one, or a kernel."""

from __future__ import annotations

from dsv4_jax.errors import InputError
from pallas_kernels.target import GPU, TPU, target_platform

AUTO, XLA = "auto", "xla"
IMPLEMENTATIONS = (AUTO, XLA, GPU, TPU)


def choose(operation: str, implementation: str, *, worthwhile: bool = True) -> str:
    """Return "xla", "gpu" or "tpu".

    "auto" takes the kernel of the platform that the program is made for, if there is one and it is
    worthwhile. A named implementation is taken wherever it is asked for; where a kernel is not at
    home it is interpreted, which is slow.

    Raises:
      InputError: there is no such implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise InputError(
            f"{operation}: expected implementation to be one of {', '.join(IMPLEMENTATIONS)}, "
            f"got {implementation!r}"
        )
    if implementation != AUTO:
        return implementation
    platform = target_platform()
    return platform if worthwhile and platform in (GPU, TPU) else XLA
