"""Measure whole training steps of a 7-layer model over sequence lengths.

    python benchmarks/train_step.py --lengths=256,1024,4096

Prints tokens per second with AdamW, what Muon costs more, memory and GFLOP. The dimensions are
those at which MaxText 0.2.5 was measured; see benchmarks/README.md.
"""

from __future__ import annotations

import sys
import time

import jax
from absl import app, flags
from seven_layers import CONFIG

from dsv4_jax import Runtime
from dsv4_jax.compiler import compiler_options
from dsv4_jax.flops import count_flops
from dsv4_jax.run_config import DataConfig, MeshConfig, OptimizerConfig, RunConfig, TrainConfig
from dsv4_jax.train_step import init_state, make_train_step

LENGTHS = flags.DEFINE_list("lengths", ["256", "1024", "4096"], "Tokens per sequence.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed steps; the fastest is printed.", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.")


def run_config(length: int, optimizer: str) -> RunConfig:
    """Return a run of the measured dimensions, batch 1."""
    return RunConfig(
        model=CONFIG,
        runtime=Runtime(dtype=DTYPE.value),
        data=DataConfig(seq_len=length, batch_size=1),
        optimizer=OptimizerConfig(
            name=optimizer, learning_rate=1e-3, end_learning_rate=1e-4, warmup_steps=10,
            decay_fraction=0.1,
        ),
        train=TrainConfig(steps=1000, eval_every=100, checkpoint_every=100),
        mesh=MeshConfig(),
    )


def measure(config: RunConfig) -> tuple[float, float, int, float]:
    """Return seconds per step, seconds to compile, temporary bytes and GFLOP."""
    length = config.data.seq_len
    tokens = jax.random.randint(jax.random.key(1), (1, length), 0, config.model.vocab_size)
    batch = {"tokens": tokens}
    state, step = init_state(config), make_train_step(config)
    gflop = count_flops(step, state, batch).total / 1e9
    start = time.perf_counter()
    program = jax.jit(step, donate_argnums=0, compiler_options=compiler_options())
    compiled = program.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - start
    seconds = []
    for _ in range(REPEATS.value + 1):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, batch))
        seconds.append(time.perf_counter() - start)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return min(seconds[1:]), compile_seconds, temporary, gflop


def main(argv):
    if len(argv) > 1:
        sys.exit(f"expected flags only, got {argv[1]!r}")
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {DTYPE.value}")
    print("| tokens | tokens/s, AdamW | Muon, ms more | GFLOP | temporary MB | compile s |")
    print("|---|---|---|---|---|---|")
    for length in map(int, LENGTHS.value):
        adamw, compile_seconds, temporary, gflop = measure(run_config(length, "adamw"))
        muon = measure(run_config(length, "muon"))[0]
        print(
            f"| {length} | {length / adamw:,.0f} | {(muon - adamw) * 1e3:.0f} | {gflop:.1f} "
            f"| {temporary / 1e6:.0f} | {compile_seconds:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    app.run(main)
