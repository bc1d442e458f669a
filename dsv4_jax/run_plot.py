"""Draw how a run goes: what its metrics say, in one figure."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsv4_jax.errors import InputError
from dsv4_jax.figures import check_figure, write_figure
from dsv4_jax.log import METRICS_FILE, read_metrics
from dsv4_jax.pace import SPEED
from dsv4_jax.train_step import HELD_OUT, LOAD

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# By name, its steps and its values: numbers, NaN for none, or the numbers of each expert.
Series = dict[str, tuple[np.ndarray, np.ndarray]]

FEW = 60  # values up to which each is marked


def plot_run(workdir: str, out: str | None = None) -> Path:
    """Draw the metrics of a run, which may be going on; return the PNG's path.

    Args:
      out: the PNG; None: `metrics.png` in the workdir.
    Raises:
      InputError: there are no metrics, the file cannot be written, or matplotlib is not installed.
    """
    path = Path(out) if out else Path(workdir, METRICS_FILE).with_suffix(".png")
    series = read_series(workdir)
    check_figure(path, "out")
    write_figure(draw_run(series), path, "out")
    return path


def read_series(workdir: str) -> Series:
    """Return all metrics of a workdir, step by step.

    Raises:
      InputError: it has none.
    """
    path = Path(workdir, METRICS_FILE)
    try:
        records = list(read_metrics(path))
    except OSError as error:
        raise InputError(
            f"workdir: expected the folder of a training, but {path} cannot be read: "
            f"{error.strerror}; name the --workdir of launch/train.py"
        ) from error
    if not records:
        raise InputError(f"workdir: expected metrics in {path}, got none yet; wait for a step")
    found = defaultdict(lambda: ([], []))
    for record in records:
        for name, value in record.items():
            steps, values = found[name]
            steps.append(record["step"])
            values.append(value)
    return {name: (np.array(s), _floats(v, name, path)) for name, (s, v) in found.items()}


def _floats(values: list, name: str, path: Path) -> np.ndarray:
    """Return the values of a metric; JSON's null, where none was finite, becomes NaN."""
    try:
        return np.array(values, float)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path}: expected numbers as {name!r}; mend or remove the lines with others"
        ) from error


def draw_run(series: Series) -> Figure:
    """Draw each metric over the steps, and the load of each expert at the last evaluation."""
    from matplotlib.figure import Figure

    figure = Figure((14, 16), layout="constrained")
    (loss, rate), (load, heat), (error, norm), (speed, goodput) = figure.subplots(4, 2)
    _draw_losses(loss, series)
    _draw_lines(rate, series, "learning rate", "learning_rate")
    _draw_busiest(load, series)
    _draw_loads(heat, series)
    _draw_lines(error, series, "Sinkhorn error", "sinkhorn_error", scale="log")
    _draw_lines(norm, series, "gradient norm", "grad_norm", scale="log")
    _draw_lines(speed, series, "tokens per second", f"{SPEED}tokens_per_second")
    _draw_lines(goodput, series, "share", f"{SPEED}goodput", f"{SPEED}mfu")
    return figure


def _draw_losses(axes: Axes, series: Series) -> None:
    _draw_lines(axes, series, "nats per token", "loss", "mtp_loss")
    _draw_lines(axes.twinx(), series, "bits per byte", HELD_OUT, style="k--", side="right")


def _draw_lines(
    axes: Axes, series: Series, label: str, *names: str, scale: str = "linear", style: str = "-",
    side: str = "left",
) -> None:
    """Draw the metrics of these names that the run has; the legend stands above, on this side."""
    for name in names:
        if name in series:
            steps, values = series[name]
            marker = "." if len(steps) <= FEW else None
            axes.plot(steps, values, style, marker=marker, linewidth=1, label=name)
            above = {"left": 0, "right": 1}[side], 1
            axes.legend(loc=f"lower {side}", bbox_to_anchor=above, ncols=2, frameon=False)
    axes.set(xlabel="step", ylabel=label, yscale=scale)


def _draw_busiest(axes: Axes, series: Series) -> None:
    """Draw the load of the busiest expert of each layer, and of all of them."""
    from matplotlib import colormaps

    layers = _layers(series)
    for number, layer in enumerate(layers):
        steps, loads = series[layer]
        colour = colormaps["viridis"](number / len(layers))
        axes.plot(steps, loads.max(axis=1), marker=".", linewidth=1, color=colour)
    _draw_lines(axes, series, "load of the busiest expert / mean", "max_load", style="k:")
    axes.set_title("layers from dark to light", loc="right")


def _draw_loads(axes: Axes, series: Series) -> None:
    """Draw the latest load of every expert of every layer; white is even."""
    layers = _layers(series)
    axes.set(xlabel="expert", ylabel="layer")
    if layers:
        loads = [series[layer][1][-1] for layer in layers]
        image = axes.imshow(loads, vmin=0, vmax=2, cmap="RdBu_r", aspect="auto")
        axes.set_yticks(range(len(layers)), [layer.removeprefix(LOAD) for layer in layers])
        axes.set_title(f"at step {series[layers[0]][0][-1]}")
        axes.figure.colorbar(image, ax=axes, label="load / mean", extend="max")


def _layers(series: Series) -> list[str]:
    """Return the names of the layers' loads, in the order of the layers."""
    return [name for name in series if name.startswith(LOAD)]
