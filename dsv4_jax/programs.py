"""The compiled programs of a stage."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import Mesh

from dsv4_jax.compiler import check_deterministic, compiler_options
from dsv4_jax.data import Batch
from dsv4_jax.feed import Ahead
from dsv4_jax.flops import flops_of
from dsv4_jax.pace import Pace
from dsv4_jax.run import Run
from dsv4_jax.run_config import RunConfig, StageConfig
from dsv4_jax.sharding import replicated
from dsv4_jax.stage_model import make_routing
from dsv4_jax.terminal import say, timed
from dsv4_jax.train_state import TrainState, state_shardings
from dsv4_jax.train_step import make_train_step, optimizer_flops, step_flops
from pallas_kernels.implementation import any_kernel


class Programs:
    """The compiled step of a stage: as usual, and for batches with the experts to use."""

    def __init__(self, run: Run, stage: StageConfig, pace: Pace):
        self._run, self._stage, self._pace = run, stage, pace
        self._compiled = {}

    def of(self, state: TrainState, ahead: Ahead) -> Callable:
        """Return the program for a batch; the first of its kind is waited for."""
        kind = ahead.experts is not None
        if kind not in self._compiled:
            compiled = compile_step(self._run, self._stage, state, ahead.inputs)
            if not self._compiled:
                self._tell_work(compiled[1])
            self._compiled[kind] = compiled
            self._pace.restart()
        program, self._pace.flops = self._compiled[kind]
        return program

    def _tell_work(self, flops: int) -> None:
        share = optimizer_flops(self._run.config, self._stage) / flops
        say(f"a step: {flops / 1e9:,.4g} GFLOP in matrix products, {share:.1%} of them Muon's")


def routing_of(run: Run, stage: StageConfig) -> Callable:
    """Return `make_routing` of a stage, jitted."""
    return jax.jit(
        make_routing(run.config, stage, run.mesh),
        compiler_options=options_of(run.config, run.mesh),
    )


def compile_step(
    run: Run, stage: StageConfig, state: TrainState, batch: Batch
) -> tuple[jax.stages.Compiled, int]:
    """Compile a stage's step for arguments placed as these are; count the operations of products.

    From their description: a fresh state and a restored one differ in what JAX may still move, so
    that they themselves would make two programs, and a run that goes on would compile again.
    """
    step = jitted_step(run.config, stage, run.mesh)
    described = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (state, batch)
    )
    with timed("compiling the training step"):
        traced = step.trace(*described)
        uses_more = run.mesh is not None or run.config.runtime.remat
        if uses_more or any_kernel(run.config.runtime.kernels):
            flops = step_flops(run.config, stage, *described)
        else:
            flops = flops_of(traced.jaxpr)
        compiled = traced.lower().compile(compiler_options=options_of(run.config, run.mesh))
    if run.config.train.deterministic and jax.default_backend() == "gpu":
        check_deterministic(compiled.as_text())
    return compiled, flops.matmul


def jitted_step(config: RunConfig, stage: StageConfig, mesh: Mesh | None) -> Callable:
    """Return `make_train_step` of a stage, jitted; the state is donated."""
    outputs = None
    if mesh is not None:
        # Whole metrics on each device: each host can read them.
        outputs = state_shardings(config, mesh), replicated(mesh)
    step = make_train_step(config, stage, mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=outputs)


def options_of(
    config: RunConfig, mesh: Mesh | None, platform: str | None = None
) -> dict[str, str | bool] | None:
    """Return the compiler's options for a run's programs; None: for the devices here."""
    return compiler_options(
        deterministic=config.train.deterministic, on_mesh=mesh is not None, platform=platform
    )
