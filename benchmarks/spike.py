"""A loss spike made on purpose: an undisturbed run, one that goes back, and one that does not.

    python benchmarks/spike.py [--steps=300] [--batch_tokens=1024]

A run of configs/tiny.py in one dense stage meets, for a few steps, random tokens and a learning
rate many times the usual. All three runs see the same batches at the same steps, so that their
losses are compared step by step.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import jax
from absl import app, flags, logging

from dsv4_jax import programs
from dsv4_jax.cli import read_config_file
from dsv4_jax.flops import count_flops
from dsv4_jax.run_config import RunConfig
from dsv4_jax.stage_model import abstract_inputs, make_routing
from dsv4_jax.train import train
from dsv4_jax.train_state import abstract_state
from dsv4_jax.train_step import optimizer_flops, step_flops

STEPS = flags.DEFINE_integer("steps", 300, "Steps of each run.", lower_bound=100)
BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 1024, "Tokens of a step.", lower_bound=256)
BURST = flags.DEFINE_integer("burst", 4, "Steps that are disturbed.", lower_bound=1)
FACTOR = flags.DEFINE_float("factor", 30.0, "Of the learning rate in these steps.")
TINY = Path(__file__).parents[1] / "configs" / "tiny.py"
LAST = 20  # steps at the end whose mean loss is compared


def run_config(guard: bool) -> RunConfig:
    sections = read_config_file(str(TINY)).to_dict()
    stage = sections["stages"]["stage1"]
    stage |= {"tokens": STEPS.value * BATCH_TOKENS.value, "batch_tokens": BATCH_TOKENS.value}
    sections["stages"] = {"stage1": stage}
    sections["train"] |= {
        "eval_every": STEPS.value, "checkpoint_every": 10, "sample_tokens": 1,
        "keep_checkpoints": 4,
    }
    sections["spikes"] |= {"guard": guard, "steps": 50}
    return RunConfig.from_config_dict(sections)


class Disturbance:
    """Compile steps that meet random tokens and a high learning rate at half of the run."""

    def __init__(self):
        self._compile = programs.compile_step
        self._first = STEPS.value // 2

    def __call__(self, run, stage, state, batch):
        rate = FACTOR.value * run.config.optimizer.learning_rate
        program, flops = self._compile(run, stage, state, batch)
        rough, _ = self._compile(
            run, dataclasses.replace(stage, learning_rate=rate), state, batch
        )

        def take(state, batch):
            step = int(state.step) + 1
            if not self._first <= step < self._first + BURST.value:
                return program(state, batch)
            tokens = jax.random.randint(
                jax.random.key(step), batch["tokens"].shape, 0, run.config.model.vocab_size
            )
            return rough(state, batch | {"tokens": tokens})

        return take, flops


def run(name: str, *, guard: bool, disturbed: bool) -> dict[int, dict]:
    """Train; return the metrics by step."""
    original = programs.compile_step
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        workdir = Path(folder, "run")
        if disturbed:
            programs.compile_step = Disturbance()
        try:
            with contextlib.redirect_stdout(nowhere):
                train(run_config(guard), workdir)
        finally:
            programs.compile_step = original
        found = {}
        for line in (workdir / "metrics.jsonl").read_text().splitlines():
            values = json.loads(line)
            found.setdefault(values["step"], {}).update(values)
    print(f"{name}: done", file=sys.stderr, flush=True)
    return found


def mean_loss(metrics: dict[int, dict]) -> float:
    last = [metrics[step]["loss"] for step in range(STEPS.value - LAST + 1, STEPS.value + 1)]
    return statistics.mean(last)


def main(argv):
    if len(argv) > 1:
        sys.exit(f"expected flags only, got {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    print(f"{jax.default_backend()}, {STEPS.value} steps of {BATCH_TOKENS.value} tokens; "
          f"{BURST.value} steps from {STEPS.value // 2} on with random tokens and "
          f"{FACTOR.value:g} times the learning rate\n")
    runs = {
        "undisturbed": run("undisturbed", guard=True, disturbed=False),
        "disturbed, goes back": run("guarded", guard=True, disturbed=True),
        "disturbed, goes on": run("unguarded", guard=False, disturbed=True),
    }
    usual = mean_loss(runs["undisturbed"])
    score = "held_out_bits_per_byte"
    print(f"| run | mean loss of the last {LAST} steps | over undisturbed | held-out bits per byte "
          "| skipped batches |\n|---|---|---|---|---|")
    for name, metrics in runs.items():
        loss, end = mean_loss(metrics), metrics[STEPS.value]
        print(f"| {name} | {loss:.4f} | {loss / usual - 1:+.2%} | {end[score]:.4f} | "
              f"{end['skipped']:.0f} |")
    times = {True: [], False: []}
    for values in runs["disturbed, goes back"].values():
        if "speed/seconds_step" in values:
            active = values["anticipatory_routing"] > 0
            times[active].append(values["speed/seconds_per_step"])
    active, usual = (statistics.median(times[key]) for key in (True, False))
    print(f"\na step with anticipatory routing takes {active / usual:.2f} of the usual time "
          f"({len(times[True])} steps, medians {active * 1e3:.0f} and {usual * 1e3:.0f} ms)")
    print_work(run_config(guard=True))


def print_work(config: RunConfig) -> None:
    """Print how many operations it takes to choose the experts of a batch."""
    (stage,), state = config.stages, abstract_state(config)
    batch = abstract_inputs(stage)
    routing = count_flops(make_routing(config, stage), state.params, batch).matmul
    step = step_flops(config, stage, state, batch).matmul
    passes = step - optimizer_flops(config, stage)
    print(f"choosing the experts of a batch takes {routing / 1e9:.1f} GFLOP, {routing / step:.1%} "
          f"of a step's and {routing / passes:.1%} of those of its forward and backward passes")


if __name__ == "__main__":
    app.run(main)
