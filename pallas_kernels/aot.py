"""Compile for accelerators that are not here, and read what their compilers say of a kernel.

`python -m pallas_kernels.aot` prints a table of every kernel at the shapes of released models.

JAX compiles for a described device as for a present one. For a GPU the compiler leaves PTX, which
`ptxas` assembles with a count of registers and spills. For a TPU it leaves its schedule: how many
bundles of instructions the kernel has, of at least a cycle each; most are those of a step of the
grid, unless it loops. That is the compiler's account, not a measurement.

Needs the extra `aot`.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels.cached_attention import cases as cached_attention
from pallas_kernels.case import Case
from pallas_kernels.compressor import cases as compressor
from pallas_kernels.cross_entropy import cases as cross_entropy
from pallas_kernels.index_loss import cases as index_loss
from pallas_kernels.indexer import cases as indexer
from pallas_kernels.mhc import cases as mhc
from pallas_kernels.moe import cases as moe
from pallas_kernels.newton_schulz import cases as newton_schulz
from pallas_kernels.sparse_attention import cases as sparse_attention
from pallas_kernels.target import GPU, TPU, compiling_for

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
GPUS = ("h100", "b200")
TARGETS = (*TPUS, *GPUS)
CASES = (
    cached_attention, compressor, cross_entropy, index_loss, indexer, mhc, moe, newton_schulz,
    sparse_attention,
)

# Read when the TPU compiler is first used in a process. All passes of a large program would be
# gigabytes.
_TPU_DUMPS = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=original|final_hlo"
)


class KernelReport(NamedTuple):
    """What a compiler says of one kernel."""

    name: str
    memory: int  # bytes of VMEM on a TPU, of shared memory for one program on a GPU
    spills: int  # on a TPU stores of registers that were wanted for others, on a GPU their bytes
    registers: int | None  # of a thread; GPU
    bundles: int | None  # of all its code, of at least a cycle each; TPU


class Compiled(NamedTuple):
    """A compiled program and its kernels."""

    seconds: float
    kernels: tuple[KernelReport, ...]


def compile_for(target: str, function: Callable, *arguments: jax.ShapeDtypeStruct) -> Compiled:
    """Compile a function for one of TARGETS.

    Raises:
      jax.errors.JaxRuntimeError: the device's compiler refuses it, for want of memory say.
      RuntimeError: the compiler's account lacks a kernel.
    """
    device = described_device(target)
    sharding = SingleDeviceSharding(device)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    platform = "cuda" if target in GPUS else "tpu"
    with compiling_for(device):
        lowered = jax.jit(function).trace(*placed).lower(lowering_platforms=(platform,))
    written = _kernels(lowered.as_text())
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        compiled = lowered.compile(
            compiler_options={"xla_dump_to": folder} if target in GPUS else None
        )
        seconds = time.perf_counter() - start
        reports = _gpu_reports(Path(folder)) if target in GPUS else _tpu_reports()
    kernels = _of(written, reports)
    if missing := _called(written, compiled.as_text()) - {kernel.name for kernel in kernels}:
        raise RuntimeError(f"{target}: expected the compiler to tell of {sorted(missing)}")
    return Compiled(seconds, kernels)


def _kernels(program: str) -> set[str]:
    """Return the names of a program's own kernels; compilers make others of what is around them."""
    return set(re.findall(r'\b(?:kernel_)?name = "(\w+)"', program))


def _called(names: Collection[str], program: str) -> set[str]:
    """Return which kernels a compiled program calls: those whose results it wants."""
    calls = [line for line in program.splitlines() if "custom-call(" in line]
    return {max(found, key=len) for call in calls if (found := [x for x in names if x in call])}


def _of(names: Collection[str], reports: Collection[KernelReport]) -> tuple[KernelReport, ...]:
    """Keep reports of these kernels, to whose names transformations and repetitions add."""
    kept = []
    for report in reports:
        found = [name for name in names if name in report.name]
        if found:
            kept.append(report._replace(name=max(found, key=len)))
    return tuple(kept)


@functools.cache
def described_device(target: str) -> jax.Device:
    """Return a device of a kind that need not be here."""
    if target in GPUS:
        description = (Path(__file__).parent / "gpus" / f"{target}.txtpb").read_text()
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=target, target_config=description, topology="1x1x1"
        )
        return topology.devices[0]
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ["LIBTPU_INIT_ARGS"] = f"{flags} {_TPU_DUMPS.format(folder=_tpu_dumps())}"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may compile
    return topologies.get_topology_desc(platform="tpu", topology_name=TPUS[target]).devices[0]


@functools.cache
def _tpu_dumps() -> Path:
    return Path(tempfile.mkdtemp(prefix="tpu_dumps_"))


def _gpu_reports(folder: Path) -> tuple[KernelReport, ...]:
    launches = "".join(path.read_text() for path in folder.glob("*thunk_sequence.txt"))
    shared = dict(
        re.findall(r"CustomKernel.*?\] (\S+) grid:.*?shared_memory: (\d+)", launches)
    )
    reports = []
    for path in sorted(folder.glob("*.ptx")):
        text = path.read_text()
        for name in set(re.findall(r"\.entry (\w+)\(", text)) & set(shared):
            said = _assemble(path, re.search(r"\.target (\w+)", text)[1], name)
            spills = int(re.search(r"(\d+) bytes spill stores", said)[1])
            registers = int(re.search(r"Used (\d+) registers", said)[1])
            reports.append(KernelReport(name, int(shared[name]), spills, registers, None))
    return tuple(reports)


def _assemble(ptx: Path, architecture: str, name: str) -> str:
    """Return what `ptxas` says of an entry function."""
    root = Path(importlib.util.find_spec("nvidia").submodule_search_locations[0])
    (ptxas,) = root.glob("*/bin/ptxas")
    command = [ptxas, "-v", f"-arch={architecture}", ptx, "-o", ptx.with_suffix(".cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return said[said.index(f"'{name}'") :]


def _tpu_reports() -> tuple[KernelReport, ...]:
    """Read what the compiler has left, and remove it."""
    dumps = list(_tpu_dumps().iterdir())
    # Names are a time, the kernel, a number and what was dumped.
    named = ((re.fullmatch(r"\d+-([a-z]\w*\.\d+)-\d+-(.*)", p.name), p) for p in dumps)
    files = {found.groups(): path for found, path in named if found}
    reports = []
    for (kernel, what), path in sorted(files.items()):
        if not what.startswith("final_hlo-static-per-bundle-"):
            continue
        original = files.get((kernel, "original.txt"))
        if original is None:
            continue  # the compiler's own
        original = original.read_text()
        sizes = re.findall(r"space=vmem, size = (0x[0-9a-f]+), scoped", original)
        spills, bundles = _schedule(path.read_text())
        memory = sum(int(size, 16) for size in sizes)
        reports.append(KernelReport(kernel.partition(".")[0], memory, spills, None, bundles))
    for path in dumps:
        path.unlink()
    return tuple(reports)


def _schedule(text: str) -> tuple[int, int]:
    """Return how often a register is spilled, and the number of bundles.

    The text has the names of the units, their slots in a bundle and a line for each bundle.
    """
    _, names, _, _, *rows = text.splitlines()
    place = names.split(", ").index("VSTORE:SPILL")
    return sum(int(row.split()[place]) for row in rows), len(rows)


def all_cases() -> Iterator[Case]:
    """Yield cases of every operation that together have each of its kernels."""
    for module in CASES:
        yield from (case for case in module.cases() if not case.covered)


def rows(case: Case, target: str) -> Iterator[str]:
    """Compile a case for a target and yield a row of the table for each of its kernels.

    Raises: what `compile_for` raises.
    """
    implementation = GPU if target in GPUS else TPU
    seconds, kernels = compile_for(target, case.run(implementation), *case.arguments)
    for name, memory, spills, registers, bundles in kernels:
        said = [registers, bundles, spills]
        said = " | ".join("" if x is None else f"{x:,}" for x in said)
        yield (
            f"| {case.operation} | {case.name} | {target} | {name} | {seconds:.1f} | "
            f"{memory / 1024:,.0f} | {said} |"
        )


HEADING = (
    "| operation | case | target | kernel | compile, s | VMEM or shared memory, KiB | registers | "
    "bundles | spills |\n|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Print what the compilers say of every kernel."""
    print(HEADING)
    for case, target in itertools.product(all_cases(), TARGETS):
        for row in rows(case, target):
            print(row, flush=True)


if __name__ == "__main__":
    main()
