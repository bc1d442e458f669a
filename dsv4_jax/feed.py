"""The batches that a stage takes next, with the experts that older parameters chose for them.

With anticipatory routing the experts of step t are those that the parameters of step t - d choose:
a batch is read d steps early and routed then. The weights of the experts' outputs are of step t.
At other times one batch is read ahead and nothing is routed.

Source: report 4.2.3.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from dsv4_jax.data import TrainIterator

Experts = dict[str, jax.Array]  # by the path of a block


class Ahead(NamedTuple):
    """A batch that was read."""

    step: int  # that takes it
    batch: dict[str, Any]  # on the devices
    place: dict[str, Any]  # in the data, after it
    experts: Experts | None

    @property
    def inputs(self) -> dict[str, Any]:
        """What the step takes."""
        return self.batch if self.experts is None else self.batch | {"experts": self.experts}


class Feed:
    """Read the batches of a stage's steps from `first` to `last`.

    Args:
      place: puts a batch on the devices.
      route: from parameters and a batch to its experts.
      lag: d.
      routed: the experts of the first batches, of a run that goes on.
    """

    def __init__(
        self, batches: TrainIterator, first: int, last: int, *, place: Callable, route: Callable,
        lag: int, routed: Sequence[Experts] = (),
    ):
        self._batches, self._next, self._last = batches, first, last
        self._place, self._route, self._lag = place, route, lag
        self._queue: deque[Ahead] = deque()
        for experts in routed:
            self._read(experts)

    def read(self, params: dict, step: int, until: int) -> None:
        """Read ahead after a step: one batch, or d more if these are to be routed.

        Args:
          params: of the model after the step; they route what has no experts yet.
          until: the last step that takes routed batches.
        """
        reach = max(step + 1, min(step + 1 + self._lag, until))
        while self._next <= min(reach, self._last):
            self._read(None)
        self._queue = deque(
            item._replace(experts=self._route(params, item.batch))
            if item.experts is None and item.step <= until else item
            for item in self._queue
        )

    def take(self) -> Ahead:
        """Return the batch of the next step."""
        return self._queue.popleft()

    def drop_experts(self) -> None:
        """Forget the experts: other parameters are to choose."""
        self._queue = deque(item._replace(experts=None) for item in self._queue)

    @property
    def routed(self) -> list[Experts]:
        """The experts of the batches ahead."""
        return [item.experts for item in self._queue if item.experts is not None]

    def _read(self, experts: Experts | None) -> None:
        batch = self._place(next(self._batches))
        self._queue.append(Ahead(self._next, batch, self._batches.get_state(), experts))
        self._next += 1
