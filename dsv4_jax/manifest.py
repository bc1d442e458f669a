"""The manifest of a checkpoint: written before the checkpoint counts, checked before it is used.

It names every file of the folder with its SHA-256, and carries what the writer says of the
content. Its own SHA-256 is in it, so that a damaged manifest does not pass either.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dsv4_jax.errors import InputError
from dsv4_jax.files import write_atomically

MANIFEST_FILE = "MANIFEST.json"
HASHING_THREADS = 8


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write the manifest of the files that a folder has now.

    Args:
      facts: JSON types, about the content.
    Raises:
      InputError: the folder cannot be written.
    """
    body = {**facts, "files": _digests(folder, _names(folder))}
    text = _serialise(body | {"sha256": _own_digest(body)})
    write_atomically(folder / MANIFEST_FILE, text)


def check_manifest(folder: Path, unlisted: frozenset[str]) -> dict[str, Any]:
    """Compare a folder with its manifest and return what the manifest says.

    Args:
      unlisted: names of files that came after the manifest.
    Raises:
      InputError: a file is missing, changed, or not of this checkpoint; the manifest is damaged;
        something cannot be read.
    """
    try:
        body = _read(folder / MANIFEST_FILE)
        names = _names(folder) - unlisted
        listed = body["files"]
        for name in sorted(names ^ set(listed)):
            raise InputError(f"{name}: {'is missing' if name in listed else 'is not in it'}")
        for name, digest in _digests(folder, names).items():
            if digest != listed[name]:
                raise InputError(f"{name}: its bytes are not those that were written")
    except (OSError, InputError) as error:
        raise InputError(f"{folder}: not as {MANIFEST_FILE} has it: {error}") from error
    return body


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path.name}: is missing")
    data = path.read_bytes()
    try:
        body = json.loads(data)
        whole = _serialise(body) == data and body.pop("sha256") == _own_digest(body)
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):  # any JSON, or none
        whole = False
    if not whole:
        raise InputError(f"{path.name}: is damaged itself")
    return body


def _names(folder: Path) -> set[str]:
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return {str(path.relative_to(folder)) for path in files} - {MANIFEST_FILE}


def _digests(folder: Path, names: set[str]) -> dict[str, str]:
    def digest(name: str) -> str:
        with open(folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    ordered = sorted(names)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return dict(zip(ordered, pool.map(digest, ordered), strict=True))


def _own_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(_serialise(body)).hexdigest()


def _serialise(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()
