"""Draw shares of retrieved facts as a heat map."""

from __future__ import annotations

import numpy as np

from dsv4_jax.figures import write_figure

FLAG = "needle_plot"  # says where to write


def write_plot(path: str, lengths: list[int], depths: list[float], shares: np.ndarray) -> None:
    """Write a PNG: lengths to the right, depths downwards, colour and number for the share.

    Args:
      shares: 0 to 1 at each [length, depth].
    Raises:
      InputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure((2 + 0.8 * len(lengths), 1.5 + 0.5 * len(depths)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.T, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set(xlabel="tokens of the prompt", ylabel="depth of the fact (1: at the question)")
    for (column, row), share in np.ndenumerate(shares):
        axes.text(column, row, f"{share:.2f}", ha="center", va="center")
    figure.colorbar(image, label="share retrieved")
    write_figure(figure, path, FLAG)
