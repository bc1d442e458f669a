"""PNG files, drawn by matplotlib, which is imported only to draw."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4_jax.errors import InputError
from dsv4_jax.files import check_file, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_figure(path: str, flag: str) -> None:
    """Refuse a figure that could not be drawn or written.

    Args:
      flag: that says where to write.
    Raises:
      InputError: matplotlib is not installed, or the path is not that of a file to be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            f"{flag}: expected the package matplotlib, got none; install it by "
            "pip install 'dsv4_jax[plot]'"
        )
    check_file(path, flag)


def write_figure(figure: Figure, path: str, flag: str) -> None:
    """Write a figure as a PNG.

    Raises:
      InputError: the file cannot be written.
    """
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    write_atomically(Path(path), file.getvalue(), flag)
