"""A folder that is written whole or not at all, by one process at a time, and resumable."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from dsv4_jax.convert.untrusted import read_json
from dsv4_jax.errors import InputError, shown
from dsv4_jax.files import explain_failed_write

PLAN = "conversion.json"  # what an unfinished conversion is of
LARGEST_PLAN = 64 << 20  # bytes
LOCK = ".lock"  # of the process that writes


class Output:
    """A folder in the making, beside the one that it becomes when the `with` block ends well.

    The name of the output appears only when everything is in it, so that a killed conversion leaves
    nothing that looks complete; its finished files stay in `.NAME.partial`, where the same
    conversion finds them again.

    Args:
      path: a folder that does not exist yet, or is empty.
      plan: what makes a conversion the same, as JSON types; None: start from nothing, and leave
        nothing if the block fails.
    Raises:
      InputError: the output exists or cannot be written, another process writes it, or an
        unfinished conversion of something else is there.
    """

    def __init__(self, path: Path, plan: dict | None = None):
        self._plan = plan
        with explain_failed_write(path, "output"):
            self.path = _resolved(path)
            self.folder = self.path.with_name(f".{self.path.name}.partial")
            if _is_new(self.path):
                return
            # Killed after it had its name, before the plan was out of it: it can be gone on with.
            if self.path.is_symlink() or self.folder.exists():
                raise _exists(self.path)
            if plan is None or _read_plan(self.path) != plan:
                raise _exists(self.path)
            os.replace(self.path, self.folder)

    def __enter__(self) -> Output:
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / LOCK, "ab")  # closed at the exit
        try:
            self._take_lock()
            with self._explained():
                self._start()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, failure: type[BaseException] | None, *_) -> None:
        try:
            if failure is None:
                self._finish()
            elif self._plan is None:
                shutil.rmtree(self.folder, ignore_errors=True)
        finally:
            self._lock.close()

    def write_json(self, name: str, document: Mapping) -> None:
        """Write a JSON file as published checkpoints have them."""
        self.write(name, [(json.dumps(document, indent=2) + "\n").encode()])

    def has(self, name: str) -> bool:
        """Say whether a file is finished."""
        return (self.folder / name).exists()

    def write(self, name: str, pieces: Iterable) -> None:
        """Write a file under its name only when all of it is on disk.

        Args:
          pieces: its bytes in order, as bytes or contiguous arrays.
        """
        writing = self.folder / f"{name}.writing"
        with self._explained():
            writing.parent.mkdir(exist_ok=True)
            file = open(writing, "wb", buffering=0)
        with file:
            for piece in pieces:
                view = memoryview(piece).cast("B")
                with self._explained():
                    while view:
                        view = view[file.write(view) :]
            with self._explained():
                os.fsync(file.fileno())
        with self._explained():
            os.replace(writing, self.folder / name)

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        return explain_failed_write(self.folder, "output")

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = (self.folder / LOCK).exists()  # else another has just finished
        except BlockingIOError:
            taken = False
        except OSError:  # a disk without locks: there nothing can be told
            taken = True
        if not taken:
            raise InputError(
                f"{self.path}: expected nobody else to write it, got another process at work in "
                f"{self.folder}; wait for it or choose another output"
            )

    def _start(self) -> None:
        """Keep the files of an attempt that is known to be of the same plan."""
        kept = (self.folder / PLAN).exists() and self._plan is not None
        if kept and _read_plan(self.folder) != self._plan:
            raise InputError(
                f"{self.folder}: expected an unfinished conversion of the same input and flags, "
                f"got another; delete it or choose another output than {self.path}"
            )
        if not kept:
            _empty(self.folder)
            if self._plan is not None:
                self.write(PLAN, [json.dumps(self._plan).encode()])

    def _finish(self) -> None:
        with explain_failed_write(self.path, "output"):
            if self.path.exists():
                self.path.rmdir()  # only an empty folder goes
            os.replace(self.folder, self.path)
            for name in (PLAN, LOCK):
                (self.path / name).unlink(missing_ok=True)
            for folder in (self.path, self.path.parent):
                descriptor = os.open(folder, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)


def _resolved(path: Path) -> Path:
    path = path.absolute()
    if not str(path).isprintable():
        raise InputError(f"output: expected a path, got {shown(str(path))}")
    if path.name in ("", ".."):
        raise _exists(path)
    return path.parent.resolve() / path.name


def _exists(path: Path) -> InputError:
    return InputError(f"{path}: expected a new folder, got one that exists; choose another")


def _is_new(path: Path) -> bool:
    if not os.path.lexists(path):
        return True
    return path.is_dir() and not path.is_symlink() and next(path.iterdir(), None) is None


def _read_plan(folder: Path) -> dict | None:
    if not (folder / PLAN).exists():
        return None
    return read_json(folder, PLAN, LARGEST_PLAN)


def _empty(folder: Path) -> None:
    for path in list(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
