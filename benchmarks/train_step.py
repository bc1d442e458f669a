"""Measure whole training steps of a 7-layer model over sequence lengths.

    python benchmarks/train_step.py --lengths=256,1024,4096
    python benchmarks/train_step.py --safety --lengths=1024 --repeats=40
    python benchmarks/train_step.py --rounding --lengths=1024 --repeats=40

The first prints tokens per second with AdamW, what Muon costs more, memory and GFLOP. The
dimensions are those at which MaxText 0.2.5 was measured; see benchmarks/README.md.

The second prints what safety costs: steps with the guard against infinities and NaNs beside steps
without, in turn, and what a checkpoint in the background holds up.

The third prints what the simulation of low precision costs: steps with it beside steps without.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from seven_layers import CONFIG

from dsv4_jax import Runtime
from dsv4_jax.checkpoint import Checkpoints
from dsv4_jax.compiler import compiler_options
from dsv4_jax.run_config import (
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    SpikeConfig,
    StageConfig,
    TrainConfig,
)
from dsv4_jax.train_state import init_state
from dsv4_jax.train_step import make_train_step, step_flops

LENGTHS = flags.DEFINE_list("lengths", ["256", "1024", "4096"], "Tokens per sequence.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed steps; the fastest is printed.", lower_bound=1)
SAFETY = flags.DEFINE_bool("safety", False, "Measure what guard and checkpoints cost instead.")
ROUNDING = flags.DEFINE_bool("rounding", False, "Measure what low precision costs instead.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.")


MODES = (
    {"linears": "fp8"}, {"linears": "fp4"}, {"keys": "fp8"}, {"indexer": "fp4"},
    {"linears": "fp4", "keys": "fp8", "indexer": "fp4"},
)


def run_config(length: int, optimizer: str) -> RunConfig:
    """Return a run of the measured dimensions, batch 1."""
    return RunConfig(
        model=CONFIG,
        runtime=Runtime(dtype=DTYPE.value),
        data=DataConfig(),
        stages=(StageConfig(tokens=1000 * length, seq_len=length, batch_tokens=length),),
        optimizer=OptimizerConfig(
            name=optimizer, learning_rate=1e-3, end_learning_rate=1e-4, warmup_steps=10,
            decay_fraction=0.1,
        ),
        train=TrainConfig(eval_every=100, checkpoint_every=100),
        mesh=MeshConfig(),
        spikes=SpikeConfig(),
    )


def batch_of(config: RunConfig) -> dict[str, jax.Array]:
    shape = 1, config.stages[0].seq_len
    return {"tokens": jax.random.randint(jax.random.key(1), shape, 0, config.model.vocab_size)}


def compiled_step(config: RunConfig, state, batch):
    program = jax.jit(
        make_train_step(config, config.stages[0]), donate_argnums=0,
        compiler_options=compiler_options(),
    )
    return program.lower(state, batch).compile()


def measure(config: RunConfig) -> tuple[float, float, int, float]:
    """Return seconds per step, seconds to compile, temporary bytes and GFLOP."""
    batch = batch_of(config)
    state = init_state(config)
    gflop = step_flops(config, config.stages[0], state, batch).total / 1e9
    start = time.perf_counter()
    compiled = compiled_step(config, state, batch)
    compile_seconds = time.perf_counter() - start
    seconds = []
    for _ in range(REPEATS.value + 1):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, batch))
        seconds.append(time.perf_counter() - start)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return min(seconds[1:]), compile_seconds, temporary, gflop


def timed_step(program, state, batch):
    start = time.perf_counter()
    state, _ = jax.block_until_ready(program(state, batch))
    return state, time.perf_counter() - start


def print_guard(config: RunConfig) -> None:
    """Take steps with and without the guard in turn; print the ratio of their times."""
    unguarded = dataclasses.replace(
        config, train=dataclasses.replace(config.train, skip_non_finite=False)
    )
    print_ratio(config, unguarded, "the guard")


def print_rounding(config: RunConfig) -> None:
    """Do the same for each kind of low precision, and for all of them together."""
    for changes in MODES:
        runtime = dataclasses.replace(config.runtime, **changes)
        rounded = dataclasses.replace(config, runtime=runtime)
        name = ", ".join(f"{key}={value}" for key, value in changes.items())
        print_ratio(rounded, config, name)


def print_ratio(config: RunConfig, other: RunConfig, name: str) -> None:
    """Take steps of both in turn; print the ratio of their times."""
    batch, programs, states = batch_of(config), [], []
    for which in (config, other):
        states.append(init_state(which))
        programs.append(compiled_step(which, states[-1], batch))
    ratios = []
    for pair in range(REPEATS.value + 1):
        seconds = [0.0, 0.0]
        for which in (0, 1) if pair % 2 else (1, 0):
            states[which], seconds[which] = timed_step(programs[which], states[which], batch)
        ratios.append(seconds[0] / seconds[1])
    ratios = ratios[1:]
    # The median lies between these two of the ordered ratios with 95 % confidence.
    half = 0.98 * len(ratios) ** 0.5
    ordered, middle = sorted(ratios), len(ratios) / 2
    low = ordered[max(0, int(middle - half))]
    high = ordered[min(len(ratios) - 1, int(middle + half))]
    print(
        f"{config.stages[0].seq_len} tokens, {config.optimizer.name}: with {name} "
        f"{statistics.median(ratios):.4f} of the time without (95 %: {low:.4f} to {high:.4f}, "
        f"{len(ratios)} pairs)", flush=True,
    )


def print_saving(config: RunConfig) -> None:
    """Save in the background every tenth step; print what it holds up."""
    state, batch = init_state(config), batch_of(config)
    program = compiled_step(config, state, batch)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    blocked, usual, after = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), keep=2, config=config.to_dict())
        for number in range(max(30, REPEATS.value) + 1):
            state, seconds = timed_step(program, state, batch)
            if number % 10 == 1 and number > 1:
                after.append(seconds)
            elif number % 10 > 4:
                usual.append(seconds)
            if number % 10 == 0:
                start = time.perf_counter()
                checkpoints.save(number, state, {"identity": {}})
                blocked.append(time.perf_counter() - start)
            checkpoints.check()
        checkpoints.close()
    step = statistics.median(usual)
    print(
        f"{config.stages[0].seq_len} tokens, {config.optimizer.name}: "
        f"a step of {step * 1e3:.0f} ms; "
        f"saving {size / 1e6:.0f} MB holds it up for {np.median(blocked[1:]) * 1e3:.0f} ms "
        f"({np.median(blocked[1:]) / step:.1%}; first time {blocked[0] * 1e3:.0f} ms); the step "
        f"beside the writing takes {np.median(after) / step:.2f} of the usual time", flush=True,
    )


def main(argv):
    if len(argv) > 1:
        sys.exit(f"expected flags only, got {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {DTYPE.value}")
    lengths = [int(length) for length in LENGTHS.value]
    if ROUNDING.value:
        for length in lengths:
            print_rounding(run_config(length, "muon"))
    elif SAFETY.value:
        for length in lengths:
            print_guard(run_config(length, "adamw"))
            print_guard(run_config(length, "muon"))
            print_saving(run_config(length, "muon"))
    else:
        print_speed(lengths)


def print_speed(lengths: list[int]) -> None:
    print("| tokens | tokens/s, AdamW | Muon, ms more (of its step) | GFLOP | temporary MB "
          "| compile s |")
    print("|---|---|---|---|---|---|")
    for length in lengths:
        adamw, compile_seconds, temporary, gflop = measure(run_config(length, "adamw"))
        muon = measure(run_config(length, "muon"))[0]
        print(
            f"| {length} | {length / adamw:,.0f} | {(muon - adamw) * 1e3:.0f} "
            f"({1 - adamw / muon:.0%}) | {gflop:.1f} "
            f"| {temporary / 1e6:.0f} | {compile_seconds:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    app.run(main)
