"""Tell the user and the workdir how a run goes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tensorboardX import SummaryWriter

from dsv4_jax.tokenizer import write_atomically

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Lines on the terminal; metrics as JSON lines and for TensorBoard in the workdir.

    Args:
      step: the run goes on from here; metrics of later steps, of a run that was cut off before
        it could save them, are dropped because those steps will come again.
    """

    def __init__(self, workdir: Path, step: int):
        path = workdir / METRICS_FILE
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
        write_atomically(path, "".join(kept).encode())
        self._file = path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Record the metrics of a step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def say(text: str) -> None:
    """Print a line at once, also into a pipe."""
    print(text, flush=True)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say what is being done, and then how long it took."""
    print(f"{what} ...", end="", flush=True)
    start = time.perf_counter()
    outcome = "failed"
    try:
        yield
        outcome = f"{time.perf_counter() - start:.1f} s"
    finally:
        say(f" {outcome}")


def duration(seconds: float) -> str:
    """Write seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _whole_lines(path: Path) -> list[str]:
    """Return a file's lines, without a last one that was cut off in writing."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
