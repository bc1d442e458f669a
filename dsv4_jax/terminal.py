"""Tell the user what happens, line by line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dsv4_jax.errors import InputError


def say(text: str) -> None:
    """Print a line at once, also into a pipe."""
    _print(text, end="\n")


def show(text: str) -> None:
    """Print a piece of a line at once."""
    _print(text, end="")


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say what is being done, and then how long it took."""
    show(f"{what} ...")
    start = time.perf_counter()
    try:
        yield
    except BaseException:
        with suppress(InputError):
            say(" failed")
        raise
    say(f" {time.perf_counter() - start:.1f} s")


def duration(seconds: float) -> str:
    """Write seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _print(text: str, *, end: str) -> None:
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        raise InputError(
            f"standard output: cannot write: {error.strerror}; make room, or keep the reader of "
            "the pipe open"
        ) from error
