"""Whatever cannot be written is said in one line, and hides nothing else."""

from __future__ import annotations

import pytest

from dsv4_jax.errors import InputError
from dsv4_jax.files import check_writable, closing, write_atomically


class Unwritable:
    def close(self) -> None:
        raise InputError("cannot write")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "not bytes")
    with pytest.raises(InputError, match="workdir: cannot write .*choose a writable folder"):
        write_atomically(path / "below a file", b"new")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="workdir: cannot write"):
        write_atomically(tmp_path / "folder", b"new")
    assert path.read_bytes() == b"old"
    assert sorted(found.name for found in tmp_path.iterdir()) == ["file", "folder"]


def test_a_writable_folder_is_made_and_left_empty(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())


def test_a_failure_in_closing_is_told_unless_something_failed_before():
    with pytest.raises(InputError, match="cannot write"), closing(Unwritable()):
        pass
    with pytest.raises(KeyError, match="before"), closing(Unwritable()):
        raise KeyError("before")
