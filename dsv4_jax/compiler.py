"""Options of the compiler: for speed, for equal sums each time, for exchange beside products."""

from __future__ import annotations

import re
from typing import NamedTuple

import jax

from dsv4_jax.errors import InputError

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


# On GPU XLA adds what is scattered to one place in the order in which threads come, and may choose
# other products at each compilation by timing them. This sorts before it adds, and times nothing.
_DETERMINISTIC = {"xla_gpu_deterministic_ops": True}



class MeshOption(NamedTuple):
    """An option for programs that run on many devices."""

    platform: str  # "tpu" or "gpu"
    name: str
    value: bool
    reason: str


_SPARSE_CORE = "xla_tpu_enable_sparse_core_collective_offload_"
_FUSION = "xla_tpu_enable_async_collective_fusion"

# By default libtpu 0.0.42 waits for all of these but permutations.
MESH_OPTIONS = (
    MeshOption(
        "tpu", "xla_tpu_enable_async_ragged_all_to_all", True,
        "tokens travel to their experts and back while another wave is computed",
    ),
    *(
        MeshOption("tpu", _SPARSE_CORE + kind, True, f"SparseCores run {what}, beside products")
        for kind, what in (
            ("all_gather", "what gathers weights along one axis of the network"),
            ("reduce_scatter", "what sums the gradients of gathered weights"),
            ("all_reduce", "the other sums of gradients"),
        )
    ),
    *(
        MeshOption("tpu", name, True, "weights gathered over several axes come piece by piece, in "
                   "fusions that compute something else")
        for name in (
            _FUSION, f"{_FUSION}_fuse_all_gather", f"{_FUSION}_multiple_steps",
            "xla_enable_async_all_gather",
        )
    ),
    MeshOption(
        "gpu", "xla_gpu_enable_latency_hiding_scheduler", True,
        "what is sent begins early and is waited for late; off by default",
    ),
)


# A scatter of floating-point numbers, alone or in a tuple; of whole ones any order is exact.
_SCATTER = re.compile(r"= [^=]*\b(?:bf|f|c)\d+\w*\[[^=]* scatter\(")


def compiler_options(
    *, deterministic: bool = True, on_mesh: bool = False, platform: str | None = None
) -> dict[str, str | bool] | None:
    """Return what to pass to `jax.jit` as `compiler_options` for steps and evaluations.

    Args:
      deterministic: the same inputs give the same bits, at every call and in every process. On CPU
        and TPU they do in any case.
      on_mesh: several devices run the program.
      platform: "cpu", "gpu" or "tpu"; None: that of the devices here.
    """
    platform = platform or jax.default_backend()
    if platform == "cpu":
        return _PRODUCTS_ONLY if jax.__version_info__ < (0, 11) else None
    options = dict(_DETERMINISTIC) if platform == "gpu" and deterministic else {}
    if on_mesh:
        options |= {x.name: x.value for x in MESH_OPTIONS if x.platform == platform}
    return options or None


def check_deterministic(program: str) -> None:
    """Refuse a compiled GPU program whose sums depend on the order of threads.

    Args:
      program: its optimized HLO, as `Compiled.as_text` gives it.
    Raises:
      InputError: something is scattered to places that are not told apart.
    """
    found = sum(
        "unique_indices=true" not in line
        for line in re.sub(r"/\*.*?\*/", "", program).splitlines() if _SCATTER.search(line)
    )
    if found:
        raise InputError(
            f"train.deterministic: expected a program that adds in one order, but the compiler "
            f"left {found} scatters that do not; take XLA_FLAGS that forbid it away, or set "
            "train.deterministic=False"
        )
