"""Record in the workdir how a run goes."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import histogram, scalar

from dsv4_jax.errors import InputError
from dsv4_jax.files import explain_failed_write, write_atomically
from dsv4_jax.wandb_log import WandbLog

METRICS_FILE = "metrics.jsonl"
BINS = 32  # of a histogram in TensorBoard

Values = dict[str, float | list[float]]  # metrics by name; those of a list are finite


class RunLog:
    """Metrics as JSON lines and for TensorBoard in the workdir.

    Args:
      step: the run goes on from here; metrics of later steps, of a run that was cut off before
        it could save them, are dropped because those steps will come again. -1: it begins.
      wandb: gets the metrics, too, and is closed with the log.
    Raises:
      InputError: by all methods, if the files cannot be written; a line of metrics is none.
    """

    def __init__(self, workdir: Path, step: int, wandb: WandbLog | None = None):
        self._wandb = wandb
        self._path = workdir / METRICS_FILE
        with explain_failed_write(self._path):
            lines = _whole_lines(self._path) if self._path.exists() else ()
            kept = [(line, record) for line, record in lines if record["step"] <= step]
            write_atomically(self._path, b"".join(line for line, _ in kept))
        self._last = {name: record for _, record in kept for name in record}
        self._board = _Board(workdir / "tensorboard", step + 1)
        with explain_failed_write(self._path):
            self._file = self._path.open("a")

    def last(self, name: str) -> dict | None:
        """Return the last record with a metric that earlier runs have left."""
        return self._last.get(name)

    def metrics(self, step: int, values: Values) -> None:
        """Record the metrics of a step, lists as histograms for TensorBoard.

        JSON has no infinities and NaNs: they are null there.
        """
        finite = {
            name: x if isinstance(x, list) or math.isfinite(x) else None
            for name, x in values.items()
        }
        with explain_failed_write(self._path):
            self._file.write(json.dumps({"step": step, "time": time.time(), **finite}) + "\n")
            self._file.flush()
        self._board.metrics(step, values)
        if self._wandb is not None:
            self._wandb.metrics(step, values)

    def close(self) -> None:
        with contextlib.ExitStack() as rest:  # each is closed, whatever happens to another
            if self._wandb is not None:
                rest.callback(self._wandb.close)
            rest.callback(self._board.close)
            with explain_failed_write(self._path):
                self._file.close()


class _Board:
    """TensorBoard's event file, written through to the disk at each call.

    tensorboardX's own SummaryWriter writes from a thread: a disk that is full kills it, and the
    run then waits for ever for its queue to empty.

    Args:
      first_step: TensorBoard hides this and later steps of earlier event files in the folder.
    """

    def __init__(self, folder: Path, first_step: int):
        self._folder = folder
        with explain_failed_write(folder):
            folder.mkdir(exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"))
        start = SessionLog(status=SessionLog.START)
        self._write([Event(step=first_step, session_log=start, wall_time=time.time())])

    def metrics(self, step: int, values: Values) -> None:
        now = time.time()
        self._write([
            Event(step=step, summary=_summary(name, x), wall_time=now)
            for name, x in values.items()
        ])

    def close(self) -> None:
        with explain_failed_write(self._folder):
            self._writer.close()

    def _write(self, events: list[Event]) -> None:
        with explain_failed_write(self._folder):
            for event in events:
                self._writer.write_event(event)
            self._writer.flush()


def _summary(name: str, value: float | list[float]) -> Summary:
    if isinstance(value, list):
        return histogram(name, np.array(value), BINS)
    return scalar(name, value)


def read_metrics(path: Path) -> Iterator[dict]:
    """Yield the metrics that a file has, also while a run writes it.

    Raises:
      InputError: a line of metrics is none.
      OSError: the file cannot be read.
    """
    return (record for _, record in _whole_lines(path))


def _whole_lines(path: Path) -> Iterator[tuple[bytes, dict]]:
    """Yield a file's lines and what they say, without a last one that was cut off in writing."""
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        yield line + b"\n", _read(line, f"{path}:{number}")


def _read(line: bytes, where: str) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # no JSON or no UTF-8
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise InputError(
            f'{where}: expected metrics, like {{"step": 1, "loss": 8.3}}, got {line[:40]!r}; '
            "mend or remove the line, or move the file away"
        )
    return record
