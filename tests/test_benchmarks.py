"""Benchmarks still run: each prints its table, at sizes that take seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.heavy
@pytest.mark.parametrize(
    "command, heading",
    [
        ("train_step.py --lengths=64 --repeats=1", "| tokens |"),
        ("attention_scaling.py --lengths=64 --repeats=1", "| layer |"),
    ],
)
def test_benchmarks_print_their_tables(command, heading):
    script, *options = command.split()
    found = subprocess.run(
        [sys.executable, BENCHMARKS / script, *options], capture_output=True, text=True, timeout=600
    )
    assert found.returncode == 0, found.stderr
    _, _, table = found.stdout.partition(heading)
    assert len(table.splitlines()) > 2
