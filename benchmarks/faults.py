"""Break training runs in every way that the tests know, in large numbers, and print the table.

    python benchmarks/faults.py [--only=F1,F5] [--soak=10000]

The tests of the mark "faults" are run with all their cases: about an hour and a half on two cores.
Rows are those of the matrix that benchmarks/README.md explains.
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

from absl import app, flags, logging

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from fault_cases import LONG  # noqa: E402

ONLY = flags.DEFINE_list("only", [], "Rows to run, such as F1; all if none is given.")
SOAK = flags.DEFINE_integer("soak", 10_000, "Steps of the long run; 0 leaves it out.", 0)


def run_tests(rows: list[str]) -> int:
    """Run the tests of these rows, print what they say of their cases; return pytest's status."""
    tests = sorted(
        str(path) for path in (ROOT / "tests").glob("test_*.py")
        if not rows or any(re.search(rf'"[^"]*\b{row}\b[,:]', path.read_text()) for row in rows)
    )
    if not tests:
        sys.exit(f"--only: expected rows that tests name, such as F5, got {', '.join(rows)}")
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        command = ["pytest", "-q", "-n", "2", "-m", "faults", f"--junitxml={report.name}", *tests]
        status = subprocess.call(
            [sys.executable, "-m", *command], cwd=ROOT, env={**os.environ, LONG: "1"}
        )
        print_table(ElementTree.parse(report.name))
    return status


def print_table(report: ElementTree.ElementTree) -> None:
    """Print the cases and seconds of each row of the matrix, and the tests that failed."""
    counts, seconds, failed = collections.Counter(), collections.Counter(), []
    for test in report.iter("testcase"):
        if test.find("failure") is not None or test.find("error") is not None:
            failed.append(test.get("name"))
        for row in test.iter("property"):
            counts[row.get("name")] += int(row.get("value"))
            seconds[row.get("name")] += float(test.get("time"))
    print("\n| fault | cases | s |\n|---|---|---|")
    for row in sorted(counts, key=_order):
        print(f"| {row} | {counts[row]:,} | {seconds[row]:.0f} |")
    print(f"\nfailed tests: {', '.join(failed) or 'none'}")


def _order(row: str) -> tuple[str, int, str]:
    letter, number = re.match(r"([A-Z])(\d+)", row).groups()
    return letter, int(number), row


def soak(steps: int) -> None:
    """Run many steps in this process; print how memory, open files and the step's time moved."""
    from training_command import sections_of, write_text

    from dsv4_jax.devices import peak_memory
    from dsv4_jax.log import RunLog
    from dsv4_jax.run_config import RunConfig
    from dsv4_jax.train import train

    seen, record = [], RunLog.metrics

    def note(self, step, values):
        record(self, step, values)
        if step % 1000 == 0 and "loss" in values:
            seen.append((step, time.perf_counter(), _resident(), len(os.listdir("/proc/self/fd"))))

    RunLog.metrics = note
    with tempfile.TemporaryDirectory() as folder:
        source = write_text(Path(folder, "text.txt"))
        plan = {"steps": steps, "eval_every": 1000, "checkpoint_every": 250, "log_every": 10}
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            train(RunConfig.from_config_dict(sections_of(source, **plan)), folder + "/run")
    print("\n| steps | ms a step since | resident MB | open files |\n|---|---|---|---|")
    for (last, since, *_), (step, now, memory, files) in zip(seen, seen[1:], strict=False):
        print(f"| {step} | {(now - since) / (step - last) * 1e3:.2f} | {memory:.1f} | {files} |")
    print(f"peak {peak_memory() / 1e6:.0f} MB")


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def main(argv):
    if len(argv) > 1:
        sys.exit(f"expected flags only, got {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    if SOAK.value:
        soak(SOAK.value)
    sys.exit(run_tests(ONLY.value))


if __name__ == "__main__":
    app.run(main)
