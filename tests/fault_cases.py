"""How many cases of each fault are tried: some in every run of the tests, all by a benchmark."""

from __future__ import annotations

import os

LONG = "DSV4_JAX_LONG_FAULTS"  # set by benchmarks/faults.py


def cases(short: int, long: int) -> int:
    """Return the number of cases to try."""
    return long if os.environ.get(LONG) else short
