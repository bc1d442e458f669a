"""Run a command so that bad input ends in one line and exit status 2."""

from __future__ import annotations

import os
import re
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from dsv4_jax.errors import InputError
from dsv4_jax.run_config import RunConfig, check_known, is_misspelling

BAD_INPUT = 2
CONFIG = "config"  # the flag of a config file; its keys are flags --config.section.key


def run(main: Callable[[], None]) -> None:
    """Parse absl flags and call main; print an InputError or a flag error as one line.

    Libraries log warnings only, unless --verbosity says otherwise. Any other exception is an
    error of ours and keeps its traceback.
    """

    def checked(_: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            _quieten_libraries()
        try:
            main()
        except InputError as error:
            _refuse(error)

    app.run(checked, flags_parser=_parse)


def require(*holders: flags.FlagHolder) -> None:
    """Raise an InputError that names the first of these flags that was not given."""
    for holder in holders:
        if not holder.value:
            flag = flags.FLAGS[holder.name]
            raise InputError(
                f"--{flag.name}: expected a value, got nothing; add --{flag.name}=... ({flag.help})"
            )


def numbers(holder: flags.FlagHolder, kind: type[int] | type[float]) -> tuple | None:
    """Return the numbers of a list flag; None if it was not given.

    Raises:
      InputError: something in it is no such number.
    """
    if holder.value is None:
        return None
    try:
        return tuple(map(kind, holder.value))
    except ValueError as error:
        expected = {int: "whole numbers", float: "numbers"}[kind]
        raise InputError(
            f"--{holder.name}: expected {expected} with commas between, got "
            f"{','.join(holder.value)!r}"
        ) from error


def read_config_file(value: str) -> ConfigDict:
    """Run a config file and return what its get_config() returns.

    Args:
      value: path of the file; what follows a colon is passed to get_config.
    Raises:
      InputError: the file cannot be read or run, or returns something else.
    """
    path, *argument = value.split(":", 1)
    if not _is_file(path):
        raise InputError(
            f"--{CONFIG}: expected a Python file, but {path!r} is none; name a file of configs/"
        )
    try:
        functions = runpy.run_path(path)
        config = functions["get_config"](*argument) if "get_config" in functions else None
        if isinstance(config, ConfigDict):
            config.lock()  # as config_flags does; fails on frozen ones and required placeholders
    except InputError:  # of what follows the colon
        raise
    except (Exception, SystemExit) as error:  # the user's: whatever it raises, it is bad input
        line = _line_of(error, path)
        raise InputError(
            f"{path}{'' if line is None else f':{line}'}: expected a config file that runs, got "
            f"{type(error).__name__}: {error}; mend the file"
        ) from error
    if not isinstance(config, ConfigDict):
        raise InputError(
            f"{path}: expected a function get_config() that returns an ml_collections.ConfigDict, "
            f"got {'a value of type ' + type(config).__name__ if config else 'none'}; see "
            "configs/tiny.py"
        )
    return config


def config_for(kind: str, devices: int) -> ConfigDict:
    """Return the value of --config or, if it says nothing of a mesh, what its file has for devices.

    That is a file whose get_config takes `KIND-DEVICES`. What flags set is set there, too.
    """
    flag = flags.FLAGS[CONFIG]
    path = config_flags.get_config_filename(flag)
    if devices == 1 or ":" in path or RunConfig.from_config_dict(flag.value).mesh.size > 1:
        return flag.value
    config = read_config_file(f"{path}:{kind}-{devices}")
    config.update_from_flattened_dict(config_flags.get_override_values(flag))
    return config


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # too long a name, or a folder that may not be looked into
        return False


def _parse(argv: list[str]) -> list[str]:
    try:
        config = _config_of(argv)
        with warnings.catch_warnings():
            # ml_collections loads the config file by an importlib call that Python deprecates.
            warnings.filterwarnings("ignore", ".*load_module.*", DeprecationWarning)
            rest = flags.FLAGS(argv)
    except InputError as error:
        _refuse(error)
    except flags.IllegalFlagValueError as error:
        _refuse(_explain_value(error, config))
    except flags.UnrecognizedFlagError as error:
        _refuse(_explain_unknown(error))
    except (flags.Error, ValueError) as error:  # ValueError: --noflag has got a value
        _refuse(f"{error}; see --help")
    if len(rest) > 1:
        _refuse(f"expected flags only, got {rest[1]!r}; write --flag=value")
    return rest


def _config_of(argv: list[str]) -> ConfigDict | None:
    """Read the config file that arguments name and check that it has the keys that they set.

    config_flags answers a bad file or key with exceptions of many types, raised late.
    """
    config = None
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        file = re.fullmatch(rf"--?{CONFIG}(=(?P<path>.*))?", argument, re.DOTALL)
        if file:
            config = read_config_file(following if file["path"] is None else file["path"])
        override = re.match(rf"--?(no)?{CONFIG}\.(?P<key>[^=]*)", argument)
        if override:
            if config is None:
                raise InputError(
                    f"{argument}: expected --{CONFIG}=FILE before it, got none; put it first"
                )
            _check_key(override["key"], config)
    return config


def _check_key(key: str, config: ConfigDict) -> None:
    prefix, node = f"--{CONFIG}.", config
    for part in key.split("."):
        if not isinstance(node, ConfigDict):
            raise InputError(
                f"{prefix}{part}: expected no key below a value, got {part!r}; set "
                f"{prefix.removesuffix('.')}=VALUE"
            )
        check_known(prefix, [part], node)
        prefix, node = f"{prefix}{part}.", node[part]


def _explain_unknown(error: flags.UnrecognizedFlagError) -> str:
    """Suggest a key of the config for a flag whose first part is a misspelt --config."""
    name, dot, key = error.flagname.partition(".")
    if dot and is_misspelling(name, CONFIG):
        return f"Unknown command line flag {error.flagname!r}; did you mean --{CONFIG}.{key}?"
    return f"{error}; see --help"


def _explain_value(error: flags.IllegalFlagValueError, config: ConfigDict | None) -> str:
    """Say of an ill-typed override which type the config has there, with its value as example."""
    match = re.match(rf"flag --{CONFIG}\.(?P<key>[\w.]+)=(?P<value>.*?): ", str(error), re.DOTALL)
    if match is None or config is None:
        return f"{error}; see --help"
    section, _, name = match["key"].rpartition(".")
    for part in filter(None, section.split(".")):
        config = config[part]
    return (
        f"--{CONFIG}.{match['key']}: expected {config.get_type(name).__name__}, got "
        f"{match['value']!r}; the config file has {config[name]!r}"
    )


def _line_of(error: Exception, path: str) -> int | None:
    """Return the line of a config file at which an exception arose."""
    if isinstance(error, SyntaxError):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    return lines[-1] if lines else None


def _quieten_libraries() -> None:
    """Let libraries log warnings only, and no tracebacks: these are of errors that they raise too.

    When a checkpoint cannot be written, Orbax logs a traceback in each of its threads, asyncio one
    for each array, and TensorStore's answers find no event loop any more. When a compiled program
    cannot be kept, or not be read again, JAX warns and compiles.
    """
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_handler().addFilter(lambda record: not record.exc_info)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    show = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            show(unraisable)

    sys.unraisablehook = hook


def _refuse(message: object) -> None:
    line = re.sub(r"\s*\n\s*", " ", str(message)).strip()
    print(f"{sys.argv[0]}: {line}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # Python would try once more at its end, and print that it failed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(BAD_INPUT)
