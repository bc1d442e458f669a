"""Where the time of a run goes: phases, tokens and operations per second, goodput."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from dsv4_jax.devices import peak_flops, peak_memory
from dsv4_jax.log import RunLog

SPEED = "speed/"  # starts the names of metrics that depend on the clock
STEP, DATA, EVALUATION, SAVING = "step", "data", "evaluation", "saving"  # phases
ELAPSED, PRODUCTIVE = f"{SPEED}elapsed_seconds", f"{SPEED}productive_seconds"


class Pace:
    """Time the phases of a run's steps.

    Goodput is the time in steps that count over all the time since the run first began: steps
    that were lost, downtime, compiling, evaluating and saving make it smaller. `log` tells when
    the run that goes on had begun, and what it had done.
    """

    flops = 0  # of the matrix products of one step, over all devices; recomputation left out

    def __init__(self, log: RunLog, *, started: float):
        self.restart()
        last = log.last(ELAPSED)
        self._productive = last[PRODUCTIVE] if last else 0.0
        self._began = last["time"] - last[ELAPSED] if last else started

    def restart(self) -> None:
        """Begin to time steps, after something else."""
        self._seconds, self._steps, self._since = Counter(), 0, time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block to a phase."""
        start = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - start

    def step(self) -> None:
        """Count a step."""
        self._steps += 1

    def values(self, tokens: int) -> dict[str, float]:
        """Return the metrics of the steps since the last call, and start anew.

        Args:
          tokens: of a step's batch, over all devices.
        """
        seconds, steps = self._seconds, self._steps
        per_step = (time.perf_counter() - self._since - seconds[EVALUATION]) / steps
        self._productive += seconds[STEP] + seconds[DATA]
        self.restart()
        elapsed = time.time() - self._began
        rate = self.flops / per_step / len(jax.devices())
        peak = peak_flops(jax.devices()[0].device_kind)
        values = {
            "tokens_per_second": tokens / per_step,
            "seconds_per_step": per_step,
            **{f"seconds_{name}": seconds[name] for name in (STEP, DATA, EVALUATION, SAVING)},
            "teraflops_per_device": rate / 1e12,
            **({"mfu": rate / peak} if peak else {}),
            "peak_memory_bytes": float(peak_memory()),
            "productive_seconds": self._productive,
            "elapsed_seconds": elapsed,
            "goodput": self._productive / elapsed,
        }
        return {SPEED + name: value for name, value in values.items()}
