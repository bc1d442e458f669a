"""Compile for accelerators that are not here, and read what their compilers say of a kernel.

JAX compiles for a described device as for a present one. For a GPU the compiler leaves PTX, which
`ptxas` assembles with a count of registers and spills. For a TPU it leaves its schedule: how many
bundles of instructions, each of one cycle, a step of the grid takes if it waits for no memory, and
how many of these keep each unit busy. That is the compiler's account, not a measurement.

Needs the extra `aot`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels.target import compiling_for

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
GPUS = ("h100", "b200")
TARGETS = (*TPUS, *GPUS)

# Read when the TPU compiler is first used in a process.
_TPU_DUMPS = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"


class KernelReport(NamedTuple):
    """What a compiler says of one kernel."""

    name: str
    memory: int  # bytes of VMEM on a TPU, of shared memory for one program on a GPU
    spills: int  # on a TPU stores of registers that were wanted for others, on a GPU their bytes
    registers: int | None  # of a thread; GPU
    bundles: int | None  # of all code, each a cycle; TPU
    matrix_busy: float | None  # share of the matrix units' slots in these that are used; TPU


class Compiled(NamedTuple):
    """A compiled program and its kernels."""

    seconds: float
    kernels: tuple[KernelReport, ...]


def compile_for(target: str, function: Callable, *arguments: jax.ShapeDtypeStruct) -> Compiled:
    """Compile a function for one of TARGETS.

    Raises:
      jax.errors.JaxRuntimeError: the device's compiler refuses it, for want of memory say.
    """
    device = described_device(target)
    sharding = SingleDeviceSharding(device)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    with tempfile.TemporaryDirectory() as folder, compiling_for(device):
        on_gpu = target in GPUS
        platform, options = ("cuda", {"xla_dump_to": folder}) if on_gpu else ("tpu", None)
        lowered = jax.jit(function).trace(*placed).lower(lowering_platforms=(platform,))
        before = set(_tpu_dumps().iterdir()) if not on_gpu else None
        start = time.perf_counter()
        lowered.compile(compiler_options=options)
        seconds = time.perf_counter() - start
        if on_gpu:
            return Compiled(seconds, _gpu_reports(Path(folder)))
        dumps = set(_tpu_dumps().iterdir()) - before
        reports = _tpu_reports(dumps)
        for path in dumps:
            path.unlink()
        return Compiled(seconds, reports)


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
    return topologies.get_topology_desc(platform="tpu", topology_name=TPUS[target]).devices[0]


@functools.cache
def _tpu_dumps() -> Path:
    return Path(tempfile.mkdtemp(prefix="tpu_dumps_"))


def _gpu_reports(folder: Path) -> tuple[KernelReport, ...]:
    launches = "".join(path.read_text() for path in folder.glob("*thunk_sequence.txt"))
    shared = {
        name: int(size)
        for name, size in re.findall(r"CustomKernel.*?\] (\S+) grid:.*?shared_memory: (\d+)", launches)
    }
    reports = []
    for ptx in sorted(folder.glob("*.ptx")):
        text = ptx.read_text()
        for name in re.findall(r"\.entry (\w+)\(", text):
            if name in shared:
                said = _assemble(ptx, re.search(r"\.target (\w+)", text)[1], name)
                registers = int(re.search(r"Used (\d+) registers", said)[1])
                spills = int(re.search(r"(\d+) bytes spill stores", said)[1])
                reports.append(
                    KernelReport(name, shared[name], spills, registers, None, None)
                )
    return tuple(reports)


def _assemble(ptx: Path, architecture: str, name: str) -> str:
    root = Path(importlib.util.find_spec("nvidia").submodule_search_locations[0])
    (ptxas,) = root.glob("*/bin/ptxas")
    command = [ptxas, "-v", f"-arch={architecture}", ptx, "-o", ptx.with_suffix(".cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return said[said.index(f"'{name}'") :]


def _tpu_reports(dumps: Sequence[Path]) -> tuple[KernelReport, ...]:
    reports = []
    for path in sorted(dumps):
        found = re.match(r"\d+-(.*)-\d+-final_hlo-static-per-bundle-utilization\.txt", path.name)
        if not found or found[1].startswith(("<late", "TLP")):
            continue
        units, used, bundles = _utilization(path.read_text())
        original = next(p for p in dumps if re.fullmatch(rf"\d+-{re.escape(found[1])}-02-original\.txt", p.name))
        sizes = re.findall(r"space=vmem, size = (0x[0-9a-f]+), scoped", original.read_text())
        reports.append(
            KernelReport(
                re.sub(r"\.\d+$", "", found[1]), sum(int(size, 16) for size in sizes),
                used["VSTORE:SPILL"], None, bundles, used["MXU"] / (bundles * units["MXU"]),
            )
        )
    return tuple(reports)


def _utilization(text: str) -> tuple[dict[str, int], dict[str, int], int]:
    """Return the slots of each unit in a bundle, how many are used in all, and the bundles."""
    _, names, capacity, _, *rows = text.splitlines()
    names = names.split(", ")
    columns = zip(*(map(int, row.split()) for row in rows), strict=True)
    units = dict(zip(names, map(int, capacity.split()), strict=False))
    return units, dict(zip(names, map(sum, columns), strict=False)), len(rows)
