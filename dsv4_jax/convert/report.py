"""Tell what a conversion did, group by group, and which weights look wrong."""

from __future__ import annotations

import collections
import dataclasses
import re
import statistics

import numpy as np

from dsv4_jax.arrays import FLOAT32
from dsv4_jax.convert.storage import Storage, stored_bytes
from dsv4_jax.convert.table import EXPERT, INTEGER, LINEAR, PLAIN, Tensor
from dsv4_jax.quant import Block, absmax, decode
from dsv4_jax.terminal import duration

SAMPLE = 65_536  # values of one tensor at most that its statistics are taken from
FEW = 64  # values below which a deviation says little
# Deviation of a matrix that no trained model has: scales were read as something else.
SMALLEST_STD, LARGEST_STD = 1e-5, 10.0
# Factor between a matrix and the median of the same matrix in other layers and experts.
UNLIKE_OTHERS = 30.0


@dataclasses.dataclass
class Group:
    """What is known of the tensors of one part of the model."""

    tensors: int = 0  # scales counted as tensors of their own
    bytes: int = 0
    stored: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    count: int = 0  # values that mean and deviation are taken from
    total: float = 0.0
    squares: float = 0.0
    absmax: float = 0.0

    def line(self, name: str) -> str:
        """Return a row of the report's table."""
        stored = ", ".join(f"{dtype} {count}" for dtype, count in self.stored.most_common())
        numbers = "" if not self.count else (
            f"{self.total / self.count:10.2e} {self.std:9.2e} {self.absmax:9.2e}"
        )
        return f"{name:18} {self.tensors:8,} {self.bytes:17,} {numbers:30} {stored}".rstrip()

    @property
    def std(self) -> float:
        """The standard deviation."""
        mean = self.total / self.count
        return max(0.0, self.squares / self.count - mean * mean) ** 0.5


class Report:
    """Counts and statistics of tensors as they are written.

    Mean and deviation come from at most `SAMPLE` values of each tensor, in evenly spaced rows; the
    largest magnitude from all. What an earlier attempt has written is counted, and not measured.
    """

    def __init__(self):
        self.seconds = 0.0  # that the conversion took
        self.kept_bytes = 0  # of files that an earlier attempt has left
        self.groups: dict[str, Group] = {}
        self._deviations: dict[str, dict[str, float]] = collections.defaultdict(dict)

    def count(self, tensor: Tensor, storage: Storage) -> None:
        """Count a tensor and, where it is quantised, its scales."""
        group = self.groups.setdefault(tensor.group, Group())
        for dtype, nbytes in stored_bytes(tensor.shape, storage):
            group.tensors += 1
            group.bytes += nbytes
            group.stored[dtype] += 1

    def measure(self, tensor: Tensor, block: Block) -> None:
        """Take the statistics of a tensor's values."""
        if tensor.kind == INTEGER:
            return
        values = sample(block).astype(np.float64)
        group = self.groups.setdefault(tensor.group, Group())
        group.count += values.size
        group.total += float(values.sum())
        group.squares += float(np.square(values).sum())
        group.absmax = max(group.absmax, absmax(block))
        if tensor.kind in (LINEAR, EXPERT, PLAIN) and len(tensor.shape) == 2 and values.size > FEW:
            alike = re.sub(r"\d+", "N", tensor.name)
            self._deviations[alike][tensor.name] = float(values.std())

    def warnings(self) -> list[str]:
        """Name the matrices whose scale is implausible."""
        found = []
        for deviations in self._deviations.values():
            usual = statistics.median(deviations.values())
            for name, std in deviations.items():
                if not SMALLEST_STD <= std <= LARGEST_STD:
                    found.append(
                        f"{name}: standard deviation {std:.2e} is implausible; expected "
                        f"{SMALLEST_STD:g} to {LARGEST_STD:g}"
                    )
                elif not usual / UNLIKE_OTHERS <= std <= usual * UNLIKE_OTHERS:
                    found.append(
                        f"{name}: standard deviation {std:.2e} is unlike the {usual:.2e} of others"
                    )
        return found

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(group.bytes for group in self.groups.values())

    def lines(self) -> list[str]:
        """Return the table: tensors, bytes and statistics of every group, and their sum."""
        whole = Group()
        for group in self.groups.values():
            whole.tensors += group.tensors
            whole.bytes += group.bytes
        head = f"{'group':18} {'tensors':>8} {'bytes':>17} {'mean':>10} {'std':>9} {'absmax':>9}"
        rows = [group.line(name) for name, group in self.groups.items()]
        return [f"{head} stored as (mean and std of a sample)", *rows, whole.line("all")]

    def speed(self) -> str:
        """Say how much was written, and how fast."""
        written = self.bytes - self.kept_bytes
        kept = f"; {self.kept_bytes / 1e9:.2f} GB of an earlier run were kept, not measured again"
        return (
            f"{written / 1e9:.2f} GB in {duration(self.seconds)}, "
            f"{written / self.seconds / 1e9:.2f} GB/s{kept if self.kept_bytes else ''}"
        )


def sample(block: Block) -> np.ndarray:
    """Return at most `SAMPLE` values of evenly spaced rows, float32."""
    values = block.values
    if values.ndim == 1:
        return values[:SAMPLE].astype(np.float32)
    per_row = values.shape[1] * (1 if block.form is None else block.form.per_byte)
    count = min(values.shape[0], max(1, SAMPLE // per_row))
    rows = np.linspace(0, values.shape[0] - 1, count).astype(np.int64)
    return decode(dataclasses.replace(block, values=values[rows], rows=rows), FLOAT32)
