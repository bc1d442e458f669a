"""Run a command so that bad input ends in one line and exit status 2."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Sequence

from absl import app, flags

from dsv4_jax.errors import InputError

BAD_INPUT = 2


def run(main: Callable[[], None]) -> None:
    """Parse absl flags and call main; print an InputError or a flag error as one line."""

    def checked(_: Sequence[str]) -> None:
        try:
            main()
        except InputError as error:
            _refuse(str(error))

    app.run(checked, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    try:
        with warnings.catch_warnings():
            # ml_collections loads the config file by an importlib call that Python deprecates.
            warnings.filterwarnings("ignore", ".*load_module.*", DeprecationWarning)
            rest = flags.FLAGS(argv)
    except flags.Error as error:
        _refuse(str(error))
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # What config_flags lets through for a file or key that it cannot use.
        _refuse(f"--config: {error}")
    if len(rest) > 1:
        _refuse(f"expected flags only, got {rest[1]!r}; write --flag=value")
    return rest


def _refuse(message: str) -> None:
    line = re.sub(r"\s*\n\s*", " ", message).strip()
    print(f"{sys.argv[0]}: {line}", file=sys.stderr)
    sys.exit(BAD_INPUT)
