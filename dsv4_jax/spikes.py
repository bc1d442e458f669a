"""Notice a loss spike from one step's numbers, and decide when to go back.

A spike is a loss or a gradient norm far above what was usual in the last steps, by median and
median absolute deviation, which a few outliers do not move. The trainer then goes back to a
checkpoint of before and goes on, for a while, with anticipatory routing.

Source: report 4.2.3 tells the method; detector, distances and durations are unpublished and ours.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from dsv4_jax.errors import InputError

if TYPE_CHECKING:
    from dsv4_jax.run_config import SpikeConfig

WATCHED = ("loss", "grad_norm")  # metrics
NORMAL_DEVIATION = 1.4826  # standard deviations of a normal distribution in one median deviation
LEAST_DEVIATION = 0.01  # of the median: what a very quiet window counts as usual


class Spike(NamedTuple):
    """What was seen."""

    step: int
    metric: str
    value: float
    usual: float  # median
    deviations: float  # of the value from it

    def __str__(self) -> str:
        return (
            f"step {self.step}: a spike, {self.metric} {self.value:.4g} where {self.usual:.4g} is "
            f"usual ({self.deviations:.0f} deviations)"
        )


class SpikeGuard:
    """Watch the steps of a run, one step behind the devices, which so never wait.

    Args:
      state: of the guard of a run that goes on; None: a fresh one.
    """

    def __init__(self, config: SpikeConfig, state: dict[str, Any] | None = None):
        state = state or {}
        self._config = config
        self._stage = state.get("stage")
        self._usual = {
            name: deque(state.get(name, ()), maxlen=config.window) for name in WATCHED
        }
        self._last = state.get("last")  # a step and its watched metrics, not looked at yet
        self._rollbacks = state.get("rollbacks", 0)
        self.until = state.get("until", 0)  # last step of anticipatory routing

    def begin_stage(self, stage: int) -> None:
        """Forget what was usual, if this is another stage: its rows are others."""
        if stage != self._stage:
            self._stage, self._last = stage, None
            for values in self._usual.values():
                values.clear()

    def look(self, step: int, metrics: Mapping[str, Any]) -> Spike | None:
        """Take a step's metrics, look at those of the step before and say whether they spike.

        Raises:
          InputError: too many spikes followed each other.
        """
        if not self._config.guard or any(name not in metrics for name in WATCHED):
            return None
        last, self._last = self._last, [step, *(metrics[name] for name in WATCHED)]
        if last is None:
            return None
        step, *values = last
        values = dict(zip(WATCHED, map(float, values), strict=True))
        if not all(map(math.isfinite, values.values())):
            return None  # it has moved nothing
        spike = self._spike(step, values)
        if spike is None:
            for name, value in values.items():
                self._usual[name].append(value)
            if step > self.until:
                self._rollbacks = 0
        return spike

    def went_back(self, spike: Spike, step: int) -> None:
        """Count a rollback after this step; the next steps are taken by anticipatory routing.

        Raises:
          InputError: there were too many.
        """
        self._rollbacks += 1
        if self._rollbacks > self._config.most_rollbacks:
            raise InputError(
                f"{spike}; expected at most {self._config.most_rollbacks} rollbacks without a calm "
                "stretch between them; look at the data of these steps, or start again with a "
                "lower optimizer.learning_rate"
            )
        self._last, self.until = None, step + self._config.steps

    def state(self) -> dict[str, Any]:
        """Return what a run that goes on needs, as JSON types; waits for the last step."""
        last = self._last
        return {
            "stage": self._stage, "until": self.until, "rollbacks": self._rollbacks,
            "last": None if last is None else [last[0], *map(float, last[1:])],
            **{name: list(values) for name, values in self._usual.items()},
        }

    def _spike(self, step: int, values: Mapping[str, float]) -> Spike | None:
        limits = (self._config.loss_deviations, self._config.norm_deviations)
        for (name, value), limit in zip(values.items(), limits, strict=True):
            before = self._usual[name]
            if len(before) < self._config.window // 2:
                continue
            median = statistics.median(before)
            spread = NORMAL_DEVIATION * statistics.median(abs(x - median) for x in before)
            deviations = (value - median) / max(spread, LEAST_DEVIATION * abs(median), 1e-30)
            if deviations > limit:
                return Spike(step, name, value, median, deviations)
        return None
