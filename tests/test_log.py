"""The log of a run survives being cut off, and a disk that is full ends it in one line."""

from __future__ import annotations

import json
import math

import pytest
from faults import small_files_only
from tensorboardX.proto.event_pb2 import Event

from dsv4_jax.errors import InputError
from dsv4_jax.log import METRICS_FILE, RunLog, read_metrics
from dsv4_jax.terminal import duration


def events_of(workdir) -> list[Event]:
    """Read TensorBoard's only event file: records of [length u64, crc u32, data, crc u32]."""
    (path,) = (workdir / "tensorboard").iterdir()
    data, events = path.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return events


def test_the_log_keeps_whole_lines_up_to_the_step_it_goes_on_from(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2}\n{"step": 2, "x": 1}\n{"step": 3}\n{"st')
    log = RunLog(tmp_path, 2)
    log.metrics(3, {"loss": 1.5})
    log.close()
    *kept, added = [json.loads(line) for line in path.read_text().splitlines()]
    del added["time"]
    assert [*kept, added] == [
        {"step": 1, "loss": 3.0}, {"step": 2}, {"step": 2, "x": 1}, {"step": 3, "loss": 1.5},
    ]


def test_tensorboard_sees_the_metrics_at_once(tmp_path):
    log = RunLog(tmp_path, 2)
    log.metrics(3, {"loss": 1.5, "grad_norm": 0.25})
    version, start, *metrics = events_of(tmp_path)
    log.close()
    assert version.file_version == "brain.Event:2"
    assert start.step == 3 and start.HasField("session_log")  # hides what was logged from here on
    found = [(e.step, e.summary.value[0].tag, e.summary.value[0].simple_value) for e in metrics]
    assert found == [(3, "loss", 1.5), (3, "grad_norm", 0.25)]
    assert all(event.wall_time > 0 for event in metrics)


def test_lists_are_kept_and_shown_as_histograms(tmp_path):
    log = RunLog(tmp_path, 0)
    log.metrics(1, {"load/layer_0": [0.5, 1.5, 0.5, 1.5], "loss": math.inf})
    log.close()
    (record,) = read_metrics(tmp_path / METRICS_FILE)
    assert record["load/layer_0"] == [0.5, 1.5, 0.5, 1.5] and record["loss"] is None
    _, _, load, _ = events_of(tmp_path)
    shown = load.summary.value[0].histo
    assert (load.step, load.summary.value[0].tag) == (1, "load/layer_0")
    assert (shown.min, shown.max, shown.num, shown.sum) == (0.5, 1.5, 4, 4)
    assert [count for count in shown.bucket if count] == [2, 2]


@pytest.mark.parametrize("line", [b"not json", b"[1]", b'{"loss": 1}', b'{"step": "1"}', b"\xff"])
def test_a_damaged_line_is_named_and_the_file_kept(line, tmp_path):
    path, content = tmp_path / METRICS_FILE, b'{"step": 1}\n' + line + b"\n"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: expected metrics, .* got b'.*; mend"):
        RunLog(tmp_path, 2)
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", [METRICS_FILE, "tensorboard"])
def test_a_full_disk_is_said_in_one_line(name, tmp_path):
    """TensorBoard's file is the larger one: with a limit for both, it is the first to fail."""
    log = RunLog(tmp_path, 0)
    values = {str(n): 1.5 for n in range(9)} if name == "tensorboard" else {"x" * 5000: 1.0}
    with small_files_only(4096), pytest.raises(InputError, match=rf"write .*{name}: .*; choose"):
        for step in range(1000):
            log.metrics(step, values)
    log.close()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*tensorboard: File exists; choose"):
        RunLog(tmp_path, 0)


def test_a_folder_in_place_of_the_file_is_refused(tmp_path):
    (tmp_path / METRICS_FILE).mkdir()
    with pytest.raises(InputError, match=r"write .*metrics\.jsonl: Is a directory; choose"):
        RunLog(tmp_path, 0)


def test_durations_read_as_clocks():
    assert [duration(s) for s in (0, 59.6, 61, 3599.4, 3661)] == [
        "0:00", "1:00", "1:01", "59:59", "1:01:01",
    ]
