"""Batches that moved nothing, told and counted."""

from __future__ import annotations

import jax

from dsv4_jax.errors import InputError
from dsv4_jax.terminal import say


class SkipWatch:
    """Tell of batches that were skipped, and end a run that does nothing else.

    Each step's numbers are looked at when the next one has been given to the devices, which so
    never wait for it.
    """

    def __init__(self, most: int, total: int):
        self._most, self._total, self._before = most, total, None

    def expect(self, total: int) -> None:
        """Take this for the batches that were skipped, when a run has gone back."""
        self._total, self._before = total, None

    def look(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Take a step's numbers, and look at those of the step before.

        Raises:
          InputError: too many batches in a row were skipped.
        """
        before, self._before = self._before, metrics
        if before is None or int(before["skipped"]) == self._total:
            return
        self._total, in_row = int(before["skipped"]), int(before["skipped_in_row"])
        say(f"step {step - 1}: the loss or gradient is not finite, its batch is skipped")
        if in_row >= self._most:
            raise InputError(
                f"step {step - 1}: expected a finite loss and gradient, got none in the last "
                f"{in_row} steps; start again from the checkpoint before, with a lower "
                "optimizer.learning_rate if it happens again"
            )
