"""The figure of a run shows what its metrics say, also while the run goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsv4_jax.errors import InputError
from dsv4_jax.log import METRICS_FILE
from dsv4_jax.run_plot import draw_run, plot_run, read_series

ROOT = Path(__file__).parents[1]
STEPS = [1, 2, 3, 4]
LOADS = {2: [[1.0, 1.0], [0.5, 1.5]], 4: [[0.75, 1.25], [2.0, 0.0]]}  # by step, of two layers
OF_STEPS = {
    "loss": [4.0, 3.0, None, 2.0],  # no finite number at step 3
    "mtp_loss": [4.5, 3.5, 3.25, 2.5],
    "learning_rate": [0.1, 0.2, 0.2, 0.1],
    "grad_norm": [1.0, 10.0, None, 2.0],
    "max_load": [1.75, 1.5, 1.5, 2.0],
    "sinkhorn_error": [1e-5, 1e-4, 1e-3, 1e-2],
    "speed/tokens_per_second": [10.0, 20.0, 30.0, 40.0],
    "speed/goodput": [0.25, 0.5, 0.5, 0.75],
}


@pytest.fixture
def workdir(tmp_path) -> Path:
    """A run of four steps that is writing a fifth line."""
    lines = []
    for place, step in enumerate(STEPS):
        lines.append({"step": step, **{name: x[place] for name, x in OF_STEPS.items()}})
        if step in LOADS:
            loads = {f"load/layer_{i}": load for i, load in enumerate(LOADS[step])}
            lines += [{"step": step, **loads}, {"step": step, "held_out_bits_per_byte": 8 / step}]
    text = "\n".join([*map(json.dumps, lines), '{"step": 5, "lo'])
    (tmp_path / METRICS_FILE).write_text(text)
    return tmp_path


def lines_of(axes) -> list[tuple[list, list]]:
    return [tuple(np.asarray(x).tolist() for x in line.get_data()) for line in axes.lines]


def test_each_panel_draws_its_metrics(workdir):
    *panels, scores, colours = draw_run(read_series(str(workdir))).axes
    shown = {}
    for axes in panels:
        for line, (steps, values) in zip(axes.lines, lines_of(axes), strict=True):
            if not line.get_label().startswith("_"):
                assert steps == STEPS
                shown[line.get_label()] = values
    expected = {name: np.array(x, float) for name, x in OF_STEPS.items()}
    assert shown.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(shown[name], values, name)
    loss, rate, busiest, heat, error, norm, *_ = panels
    assert [axes.get_yscale() for axes in panels].count("log") == 2
    assert error.get_yscale() == norm.get_yscale() == "log"
    assert lines_of(scores) == [([2, 4], [4.0, 2.0])] and scores.get_ylabel() == "bits per byte"
    assert lines_of(busiest)[:-1] == [([2, 4], [1.0, 1.25]), ([2, 4], [1.5, 2.0])]
    np.testing.assert_array_equal(heat.images[0].get_array(), LOADS[4])
    assert heat.get_title() == "at step 4"
    assert [label.get_text() for label in heat.get_yticklabels()] == ["layer_0", "layer_1"]
    assert colours.get_ylabel() == "load / mean"


def test_a_run_before_its_first_evaluation_is_drawn(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "loss": 3.0, "grad_norm": null}\n')
    loss, *_, scores = draw_run(read_series(str(tmp_path))).axes
    assert lines_of(loss) == [([1], [3.0])] and not scores.lines
    assert plot_run(str(tmp_path)).read_bytes().startswith(b"\x89PNG")


def test_the_command_writes_the_figure(workdir):
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "plot.py", f"--workdir={workdir}"],
        capture_output=True, text=True, check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"wrote {workdir}/metrics.png\n"
    assert (workdir / "metrics.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content, out, message", [
    (None, None, r"workdir: expected the folder of a training, .*metrics\.jsonl.* No such file"),
    (b"", None, r"workdir: expected metrics in .*metrics\.jsonl, got none yet; wait"),
    (b'{"step": 1}', None, "got none yet"),  # the line may not be whole
    (b"not json\n", None, r"metrics\.jsonl:1: expected metrics, .* got b'not json'; mend"),
    (b'{"step": 1, "loss": "low"}\n', None, r"metrics\.jsonl: expected numbers as 'loss'; mend"),
    (b'{"step": 1, "loss": 1}\n', ".", r"out: expected a file to write, got the folder \."),
    (b'{"step": 1, "loss": 1}\n', "/dev/null/x.png", "out: cannot write"),
])
def test_what_cannot_be_drawn_is_refused_in_one_line(content, out, message, tmp_path):
    if content is not None:
        (tmp_path / METRICS_FILE).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        plot_run(str(tmp_path), out)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "metrics.png").exists()


def test_matplotlib_that_is_not_installed_is_named(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"out: .*the package matplotlib, got none; .*\[plot\]"):
        plot_run(str(workdir))
