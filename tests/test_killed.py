"""A run that is killed or asked to stop loses nothing: the same command goes on to the same end."""

from __future__ import annotations

import contextlib
import io
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fault_cases import cases
from training_command import (
    committed_steps,
    complete,
    finish,
    metrics_of,
    result_of,
    sections_of,
    start,
    write_text,
)

from dsv4_jax.run_config import RunConfig
from dsv4_jax.train import train

F14 = "F14: the same run again, in this process or another, with and without its programs"
pytestmark = [pytest.mark.faults, pytest.mark.heavy]

STOP_WITHIN = 15  # seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    write_text(path / "text.txt")
    return path


@pytest.fixture(scope="module")
def sections(folder) -> dict:
    return sections_of(folder / "text.txt")


@pytest.fixture(scope="module")
def straight(folder, sections) -> dict:
    """What a run leaves that nothing disturbs."""
    finish(start(sections, folder / "straight", folder / "compiled"))
    return result_of(folder / "straight")


def wait_for_steps(process: subprocess.Popen, steps: int) -> None:
    """Read the output of a process until it has taken so many steps, or has ended."""
    for line in process.stdout:
        steps -= line.startswith("step ")
        if steps < 0:
            break


def resumed_from(out: str) -> int:
    found = re.search(r"resumed from the checkpoint of step (\d+)", out)
    return int(found[1]) if found else 0


def test_kill_at_any_moment(folder, sections, straight, record_property):
    """Four of five kills come while steps are taken and saved, the others at any time before."""
    choose, count, runs = random.Random(0), cases(20, 200), 0
    workdir, before = folder / "killed-0", []
    for _ in range(count):
        process = start(sections, workdir, folder / "compiled")
        if choose.random() < 0.8:
            wait_for_steps(process, choose.randrange(12))
            time.sleep(choose.random() * 0.3)
        else:
            time.sleep(choose.random() * 8)
        process.kill()
        out, errors = complete(process)
        assert errors == ""
        if process.returncode == 0:  # it was at its end already
            assert result_of(workdir) == straight
            runs += 1
            workdir = folder / f"killed-{runs}"
        assert committed_steps(workdir)[-1:] >= before[-1:] or process.returncode == 0
        before = committed_steps(workdir)
    out = finish(start(sections, workdir, folder / "compiled"))
    assert resumed_from(out) == (before[-1] if before else 0) or "the run is complete" in out
    assert result_of(workdir) == straight
    record_property("F1: kill -9, the end bit by bit that of a run without", count)


def test_sigterm_and_sigint_save_and_end_well(folder, sections, straight, record_property):
    choose, count = random.Random(1), cases(10, 50)
    # A checkpoint is only due at the end, so that the one which is found was made by the signal.
    sections = {**sections, "train": {**sections["train"], "checkpoint_every": 60}}
    workdir = folder / "stopped"
    for number in range(count):
        process = start(sections, workdir, folder / "compiled")
        wait_for_steps(process, choose.randrange(8))
        time.sleep(choose.random() * 0.05)
        sent = time.monotonic()
        process.send_signal(choose.choice([signal.SIGTERM, signal.SIGINT]))
        seen = [line for line in process.stdout if line.startswith(("step ", "ended by "))]
        assert time.monotonic() - sent < STOP_WITHIN
        errors = complete(process)[1]
        assert process.returncode == 0 and errors == "", errors
        if committed_steps(workdir)[-1] == 60:
            finish(start(sections, workdir, folder / "compiled"))
            assert result_of(workdir) == straight
            workdir = folder / f"stopped-{number}"
            continue
        step = committed_steps(workdir)[-1]
        assert f" after step {step}; the same command" in seen[-1]
        assert [line["step"] for line in metrics_of(workdir)][-1] == step
    finish(start(sections, workdir, folder / "compiled"))
    assert result_of(workdir) == straight
    record_property("F3: SIGTERM or SIGINT, exit 0 and a checkpoint of that step", count)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("number", range(cases(1, 5)))
def test_equal_commands_give_equal_bits(
    number, cached, folder, sections, straight, tmp_path, record_property
):
    """Each run is a process of its own; one has the other's compiled programs, one has none."""
    compiled = folder / "compiled" if cached else tmp_path / "compiled"
    finish(start(sections, tmp_path / "run", compiled))
    assert result_of(tmp_path / "run") == straight
    record_property(F14, 1)


@pytest.mark.parametrize("number", range(cases(1, 5)))
def test_equal_runs_of_one_process_give_equal_bits(number, folder, tmp_path, record_property):
    config = RunConfig.from_config_dict(sections_of(folder / "text.txt", steps=30))
    for name in ("first", "second"):
        with contextlib.redirect_stdout(io.StringIO()):
            train(config, tmp_path / name)
    assert result_of(tmp_path / "first") == result_of(tmp_path / "second")
    record_property(F14, 1)
