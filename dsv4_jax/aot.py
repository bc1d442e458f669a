"""Compile a training step for devices that are not here, and account for what it needs."""

from __future__ import annotations

import dataclasses
import re
import time

import jax
from jax.sharding import Mesh

from dsv4_jax.account import Exchange, Memory, bytes_here, check_size, kept_bytes
from dsv4_jax.devices import GIB, Chip, process_memory
from dsv4_jax.errors import InputError
from dsv4_jax.expert_waves import FURTHER
from dsv4_jax.hlo.collectives import ALL_TO_ALL
from dsv4_jax.hlo.overlap import compute_seconds, timed_collectives
from dsv4_jax.hlo.text import parse_program
from dsv4_jax.programs import jitted_step, options_of
from dsv4_jax.run import check_mesh
from dsv4_jax.run_config import RunConfig, StageConfig
from dsv4_jax.sharding import batch_sharding, make_mesh
from dsv4_jax.sizes import ParamCount, count_params
from dsv4_jax.stage_model import abstract_inputs
from dsv4_jax.topology import GPUS, Topology, describe
from dsv4_jax.train_state import TrainState, abstract_state
from dsv4_jax.train_step import step_flops

EXPERTS = "experts"  # the module of the routed experts, in the names of operations
_LOWERED_FOR = {"gpu": "cuda", "tpu": "tpu"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
    """What a compiled training step needs, per device, with an even load of experts."""

    devices: int
    parameters: ParamCount
    memory: Memory
    tokens: int  # of a batch
    flops: int  # in matrix products of the model and its optimizer, of all devices together
    compute_seconds: float  # of a device, by a roofline of each instruction
    exchanges: tuple[Exchange, ...]
    chip: Chip
    lower_seconds: float
    compile_seconds: float
    compiler_memory: int  # bytes, the most that this process has had until then

    @property
    def exposed_seconds(self) -> float:
        """How long a device waits for others."""
        return sum(exchange.seconds - exchange.hidden for exchange in self.exchanges)

    @property
    def step_seconds(self) -> float:
        """How long a step takes at least."""
        return self.compute_seconds + self.exposed_seconds

    @property
    def mfu(self) -> float:
        """The share of the devices' peak that the products of the model take of such a step."""
        return self.flops / self.devices / self.chip.flops / self.step_seconds


def compile_step(
    config: RunConfig, stage: StageConfig, topology: Topology, flag: str
) -> tuple[Account, str]:
    """Compile a stage's step and account for it; return the program's text, too.

    Args:
      flag: that the topology is the value of.
    Raises:
      InputError: the mesh does not fit the topology or the stage, or the step does not fit into
        the memory of a device.
    """
    mesh, chip = mesh_for(config, stage, topology, flag), topology.chip
    state, batch = abstract_state(config, mesh), _abstract_batch(stage, mesh)
    platform = "gpu" if topology.kind in GPUS else "tpu"
    start, step = time.perf_counter(), jitted_step(config, stage, mesh)
    with jax.set_mesh(mesh):  # on which nothing can run: it is for tracing alone
        traced = step.trace(state, batch)
        lowered = traced.lower(lowering_platforms=(_LOWERED_FOR[platform],))
    lowered_at = time.perf_counter()
    compiled = _compile(lowered, options_of(config, mesh, platform), chip)
    compiled_at, compiler_memory = time.perf_counter(), process_memory()
    flops, text = step_flops(config, stage, state, batch), compiled.as_text()
    return Account(
        devices=mesh.size, parameters=count_params(config.model),
        memory=_memory(config, stage, state, compiled, mesh, chip), tokens=stage.batch_tokens,
        flops=flops.matmul, **_times(text, chip, topology), chip=chip,
        lower_seconds=lowered_at - start, compile_seconds=compiled_at - lowered_at,
        compiler_memory=compiler_memory,
    ), text


def mesh_for(config: RunConfig, stage: StageConfig, topology: Topology, flag: str) -> Mesh:
    """Return a run's mesh of all devices of a topology."""
    check_size(config.mesh, topology, flag)
    mesh = make_mesh(config.mesh.sizes, describe(topology, flag))
    check_mesh(config, mesh, [stage])
    return mesh


def _abstract_batch(stage: StageConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    placed = batch_sharding(mesh, stage.rows)
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)
        for name, x in abstract_inputs(stage).items()
    }


def _compile(
    lowered: jax.stages.Lowered, options: dict | None, chip: Chip
) -> jax.stages.Compiled:
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"(Ran out of memory|Exceeded)[^.]*\([\d.]+G\)[^.\n]*", str(error))
        if needed is None:
            raise
        raise InputError(
            f"mesh: expected a step that fits into the {chip.memory / GIB:.1f} GiB of a device, "
            f"got, from the compiler: {needed[0]}; take more devices along fsdp or expert, more "
            "micro-batches, or runtime.remat"
        ) from None


def _memory(
    config: RunConfig, stage: StageConfig, state: TrainState, compiled: jax.stages.Compiled,
    mesh: Mesh, chip: Chip,
) -> Memory:
    parameters, optimizer = (bytes_here(part) for part in (state.params, state.opt_state))
    kept = kept_bytes(config, stage, mesh)
    peak = compiled.memory_analysis().peak_memory_in_bytes
    return Memory(
        parameters=parameters, optimizer=optimizer, activations=kept,
        temporaries=peak - parameters - optimizer - kept, available=int(chip.memory),
    )


def _times(text: str, chip: Chip, topology: Topology) -> dict:
    """Return how long a program computes, and what it exchanges, in the words of `Account`."""
    program, found = parse_program(text), {}
    timed = timed_collectives(program, chip, topology.devices_per_slice, _is_rare)
    for collective, seconds, hidden in timed:
        experts = collective.kind in ALL_TO_ALL and f"/{EXPERTS}/" in collective.op_name
        key = collective.kind, experts, collective.crosses
        numbers = collective.times, collective.bytes, seconds, hidden
        found[key] = [a + b for a, b in zip(found.get(key, (0.0,) * 4), numbers, strict=True)]
    exchanges = [Exchange(*key, *numbers) for key, numbers in found.items()]
    return {
        "compute_seconds": compute_seconds(program, chip, _is_rare),
        "exchanges": tuple(sorted(exchanges, key=lambda exchange: -exchange.seconds)),
    }


def _is_rare(op_name: str) -> bool:
    return FURTHER in op_name
