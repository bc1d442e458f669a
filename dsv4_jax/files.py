"""Write files: what fails is said in one line, and nothing whole is lost."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from dsv4_jax.errors import InputError

Closable = TypeVar("Closable")


@contextlib.contextmanager
def explain_failed_write(path: Path, flag: str = "workdir") -> Iterator[None]:
    """Turn an OSError of the block, which writes to the path, into an InputError.

    Args:
      flag: that says where to write.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{flag}: cannot write {path}: {error.strerror or error}; choose a writable folder "
            "with space"
        ) from error


@contextlib.contextmanager
def closing(thing: Closable) -> Iterator[Closable]:
    """Close a thing at the end of the block.

    What cannot be written in closing is an error, but hides none that ended the block.
    """
    try:
        yield thing
    except BaseException:
        with contextlib.suppress(InputError):
            thing.close()
        raise
    thing.close()


def check_writable(folder: Path, flag: str = "workdir") -> None:
    """Make a folder if need be and try that it can be written to, before work is lost for it.

    Args:
      flag: that says where to write.
    Raises:
      InputError: it cannot.
    """
    probe = folder / ".writable"
    write_atomically(probe, b"", flag)
    probe.unlink()


def check_file(path: str | os.PathLike, flag: str) -> None:
    """Try that a file can be written where a flag says, before work is lost for it.

    Raises:
      InputError: it cannot.
    """
    if Path(path).is_dir():
        raise InputError(f"{flag}: expected a file to write, got the folder {path}")
    check_writable(Path(path).parent, flag)


def write_atomically(path: Path, data: bytes, flag: str = "workdir") -> None:
    """Write a file whole or not at all, even if the process is killed.

    Args:
      flag: that says where to write.
    Raises:
      InputError: the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with explain_failed_write(path, flag):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # there is nothing left to remove after success
            temporary.unlink()
