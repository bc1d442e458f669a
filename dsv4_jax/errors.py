"""The error class for what a user can mend, and how it shows values."""

from __future__ import annotations

LONGEST = 200  # characters of a value in a message; the names of released tensors have 60


class InputError(ValueError):
    """Bad input: a config, flag, file, mesh or checkpoint that cannot be used.

    The message is one line: what was expected, what came, where, and what to do. Commands print
    it and exit with status 2.
    """


def shown(value: object) -> str:
    """Write a value that is not to be trusted for a message: on one line, and not too long."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}...{text[-LONGEST // 2 :]}"
