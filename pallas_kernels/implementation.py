"""Which implementation of an operation runs: the plain one, or a kernel."""

from __future__ import annotations

from pallas_kernels.target import GPU, TPU, is_supported, target_platform

AUTO, XLA = "auto", "xla"
IMPLEMENTATIONS = (AUTO, XLA, GPU, TPU)
# That models and their training can run by kernels.
OPERATIONS = (
    "cached_attention", "compressor", "cross_entropy", "index_loss", "indexer", "mhc", "moe",
    "newton_schulz", "sparse_attention",
)


def choose(operation: str, implementation: str, *, worthwhile: bool = True) -> str:
    """Return "xla", "gpu" or "tpu".

    "auto" takes the kernel of the device that the program is made for, if it is supported and the
    kernel is worthwhile. A named implementation is taken wherever it is asked for; a kernel that
    is not at home there is interpreted, which is slow.

    Raises:
      ValueError: there is no such implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{operation}: expected implementation to be one of {', '.join(IMPLEMENTATIONS)}, "
            f"got {implementation!r}"
        )
    if implementation != AUTO:
        return implementation
    return target_platform() if worthwhile and is_supported() else XLA


def implementation_of(operation: str, choices: str) -> str:
    """Return the implementation of an operation that was chosen.

    Args:
      choices: an implementation for all operations, then perhaps others for some, as in
        "auto,newton_schulz=xla".
    """
    general, *others = choices.split(",")
    return dict(other.split("=") for other in others).get(operation, general)


def check_choices(choices: str) -> None:
    """Check an argument of `implementation_of`.

    Raises:
      ValueError: it names an operation or an implementation that there is not.
    """
    general, *others = choices.split(",")
    named = [(None, general), *(other.split("=", 1) for other in others if "=" in other)]
    operations = [operation for operation, _ in named[1:]]
    if (
        len(set(operations)) < len(others)
        or not set(operations) <= set(OPERATIONS)
        or not {implementation for _, implementation in named} <= set(IMPLEMENTATIONS)
    ):
        raise ValueError(
            f"expected one of {', '.join(IMPLEMENTATIONS)}, then perhaps others for operations as "
            f"in 'auto,{OPERATIONS[0]}=xla' (there are {', '.join(OPERATIONS)}), got {choices!r}"
        )


def any_kernel(choices: str) -> bool:
    """Say whether an operation may run as a kernel in a program for this platform."""
    return any(choose(name, implementation_of(name, choices)) != XLA for name in OPERATIONS)
