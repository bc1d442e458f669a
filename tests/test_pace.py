"""Where the time of a run goes is logged, over all the processes that it took."""

from __future__ import annotations

import json
import time

import pytest

from dsv4_jax import pace as pacing
from dsv4_jax.devices import CHIPS, chip_of, peak_flops, peak_memory
from dsv4_jax.errors import InputError
from dsv4_jax.log import RunLog
from dsv4_jax.pace import DATA, EVALUATION, SAVING, STEP, Pace
from dsv4_jax.profile import parse_steps


class Clock:
    """A clock that is moved by hand."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(time, "time", lambda: self.now + 1e9)

    def spend(self, pace: Pace, phase: str, seconds: float) -> None:
        with pace.phase(phase):
            self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def open_log():
    logs = []

    def open_it(*arguments) -> RunLog:
        logs.append(RunLog(*arguments))
        return logs[-1]

    yield open_it
    for log in logs:
        log.close()


def test_phases_tokens_and_goodput(clock, open_log, tmp_path):
    log = open_log(tmp_path, 0)
    pace = Pace(log, started=time.time() - 6)
    pace.flops = 8 * 10**12
    for _ in range(2):
        clock.spend(pace, STEP, 1.5)
        clock.spend(pace, DATA, 0.5)
        pace.step()
    clock.spend(pace, EVALUATION, 3)
    clock.spend(pace, SAVING, 1)
    values = pace.values(tokens=100)
    assert values["speed/seconds_per_step"] == 2.5 and values["speed/tokens_per_second"] == 40
    phases = [values[f"speed/seconds_{name}"] for name in (STEP, DATA, EVALUATION, SAVING)]
    assert phases == [3, 1, 3, 1]
    assert values["speed/elapsed_seconds"] == 6 + 8 and values["speed/goodput"] == 4 / 14
    assert values["speed/teraflops_per_device"] == pytest.approx(8 / 2.5 / 8)  # eight devices
    assert "speed/mfu" not in values  # of a CPU no peak is known
    log.metrics(2, values)

    clock.now += 10  # the run was down, and what it did after step 2 is lost
    again = Pace(open_log(tmp_path, 2), started=time.time())
    clock.spend(again, STEP, 4)
    again.step()
    values = again.values(tokens=100)
    assert values["speed/productive_seconds"] == 8 and values["speed/elapsed_seconds"] == 28


def test_mfu_is_of_the_device_s_peak(clock, open_log, tmp_path, monkeypatch):
    monkeypatch.setattr(pacing, "peak_flops", lambda kind: 4e12)
    pace = Pace(open_log(tmp_path, 0), started=time.time())
    pace.flops = 8 * 10**12
    clock.spend(pace, STEP, 1)
    pace.step()
    assert pace.values(tokens=1)["speed/mfu"] == pytest.approx(8 / 8 / 4)


@pytest.mark.parametrize("kind, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("TPU v5 lite", 197e12), ("TPU v5", 459e12),
    ("TPU v5p", 459e12), ("TPU7x", 2307e12 / 2), ("cpu", None),
])
def test_peaks(kind, peak):
    assert peak_flops(kind) == peak


def test_figures_of_chips_are_in_their_units():
    """A factor of 8 or 1000 at least lies between the units that are confused."""
    for chip in CHIPS:
        assert chip_of(chip.kind) is chip
        assert 100e12 < chip.flops < 3000e12 and 0.5e12 < chip.memory_speed < 10e12
        assert 15e9 < chip.memory < 200e9
        assert 150e9 < chip.fast_network < 1000e9 and 3e9 < chip.slow_network < 60e9
    assert chip_of("TPU v5 lite").fast_network == 4 * 50e9  # links
    assert chip_of("TPU v5p").fast_network == 6 * 100e9
    assert chip_of("cpu") is None


def test_memory_is_that_of_the_process_where_devices_do_not_tell():
    before = peak_memory()
    assert 10e6 < before < 1e12
    block = bytearray(before)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_memory() > 1.5 * before


def test_records_have_the_time(open_log, tmp_path):
    log = open_log(tmp_path, 0)
    log.metrics(1, {"loss": float("nan"), "norm": 2.0})
    (record,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert abs(record.pop("time") - time.time()) < 60
    assert record == {"step": 1, "loss": None, "norm": 2.0}
    again = open_log(tmp_path, 1)
    assert again.last("norm")["step"] == 1 and again.last("other") is None


@pytest.mark.parametrize("text, steps", [("10:13", (10, 13)), ("1:1", (1, 1)), (None, None)])
def test_steps_to_trace(text, steps):
    assert parse_steps(text, "--profile_steps") == steps


@pytest.mark.parametrize("text", ["", "10", "0:3", "5:4", "1:2:3", "-1:4", "a:b", "1:9999999999"])
def test_steps_that_are_none_are_refused(text):
    with pytest.raises(InputError, match="--profile_steps: expected FIRST:LAST, such as 10:13"):
        parse_steps(text, "--profile_steps")
