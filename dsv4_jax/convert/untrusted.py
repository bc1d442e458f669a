"""Read small files of a folder that is not to be trusted, and tell what is wrong with it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from dsv4_jax.errors import InputError, shown
from dsv4_jax.hf_config import unique_keys

MOST_PARTS = 3 << 20  # of JSON: brackets, colons and commas; V4-Pro's header would have 1.8 million
SHOWN = 20  # problems named in one message


class CheckpointError(InputError):
    """Several things are wrong with one checkpoint; the message shows the first of `problems`."""

    def __init__(self, where: Path, problems: list[str]):
        first = "; ".join(problems[:SHOWN])
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        super().__init__(f"{where}: {len(problems)} wrong: {first}{more}")
        self.problems = tuple(problems)


def raise_all(where: Path, problems: list[str]) -> None:
    """Raise a CheckpointError if there are problems."""
    if problems:
        raise CheckpointError(where, problems)


@contextlib.contextmanager
def explain_failed_read(path: Path) -> Iterator[None]:
    """Turn an OSError of the block, which reads the file, into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; copy it again") from error


@contextlib.contextmanager
def explain_failed_search(folder: Path) -> Iterator[None]:
    """Turn an OSError of the block, which looks at files in the folder, into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {shown(str(error))}") from error


def checked_path(folder: Path, name: str) -> Path:
    """Return the path of a file of a folder, given by a name that is not to be trusted.

    A link may lead elsewhere in the folder, or into the `blobs` of the Hugging Face cache that the
    folder is a snapshot of.

    Raises:
      InputError: it is no plain name of a file in the folder.
    """
    quoted = shown(name)
    plain = name == os.path.basename(name) and "\\" not in name and name not in ("", ".", "..")
    if not plain or not name.isprintable():  # control characters would break messages up
        raise InputError(f"{quoted}: expected the name of a file in {folder}, got no such name")
    path = folder / name
    try:
        target = path.resolve(strict=True)
        is_file = target.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # also no path at all, or a loop
        raise InputError(f"{quoted}: expected a file in {folder}, got none; copy it") from error
    if not is_file:
        raise InputError(f"{quoted}: expected a file in {folder}, got something else; copy it")
    home = folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if target.parent not in (home, blobs):
        raise InputError(
            f"{quoted}: expected a file in {folder}, got a link out of it; replace it by the file"
        )
    return path


def read_json(folder: Path, name: str, largest: int) -> dict:
    """Read a JSON object from a file of a folder.

    Args:
      largest: bytes that are read.
    Raises:
      InputError: there is no such file, it leads out of the folder, cannot be read, is too large or
        is no JSON object.
    """
    path = checked_path(folder, name)
    with explain_failed_read(path):
        size = path.stat().st_size
        if size > largest:
            raise InputError(f"{path}: expected at most {largest} bytes, got {size}")
        text = path.read_bytes()
    document = parse_json(path, text)
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected a JSON object, got {shown(document)}; copy it again")
    return document


def parse_json(path: Path, text: bytes):
    """Parse JSON in UTF-8, refusing keys that occur twice.

    Raises:
      InputError: it is no JSON, or would take far more memory than the file has bytes.
    """
    count = sum(map(text.count, (b"{", b"[", b":", b",")))
    if count > MOST_PARTS:
        raise InputError(f"{path}: expected JSON of at most {MOST_PARTS} parts, got {count}")

    try:
        return json.loads(text.decode(), object_pairs_hook=unique_keys)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON: {shown(str(error))}") from error
