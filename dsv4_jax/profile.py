"""A trace of some of a run's steps, to be opened with xprof."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax

from dsv4_jax.errors import InputError
from dsv4_jax.files import check_writable
from dsv4_jax.terminal import say


class Profiler:
    """Trace the steps from `first` to `last`, both counted from 1, into a folder.

    A run that goes on after `first` traces what is left of them.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        self._folder, self._steps, self._on = folder, steps, False
        if steps is not None:
            check_writable(folder)

    def before(self, step: int) -> None:
        """Start the trace if the step is one of them."""
        if self._steps and not self._on and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def after(self, step: int, result: Any) -> None:
        """End the trace if the step is the last of them, when it is computed."""
        if self._on and step >= self._steps[1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """End a trace that is being made."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            say(f"trace of steps {self._steps[0]} to {self._steps[1]}: {self._folder}")


def parse_steps(text: str | None, flag: str) -> tuple[int, int] | None:
    """Read "10:13" as the steps 10 to 13.

    Raises:
      InputError: it is something else.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise InputError(f"{flag}: expected FIRST:LAST, such as 10:13, got {text!r}")
    return first, last
