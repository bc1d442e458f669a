"""The one error class for what a user can mend."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: a config, flag, file, mesh or checkpoint that cannot be used.

    The message is one line: what was expected, what came, where, and what to do. Commands print
    it and exit with status 2.
    """
