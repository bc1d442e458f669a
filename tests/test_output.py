"""Output folders are whole or not there, written by one process at a time, and gone on with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults import small_files_only

from dsv4_jax import InputError
from dsv4_jax.convert.output import LOCK, PLAN, Output

WRITE = """
import sys
from pathlib import Path
from dsv4_jax.convert.output import Output
with Output(Path(sys.argv[1]), {"a": 1}) as output:
    output.write("one", [b"1"])
    print("writing", flush=True)
    sys.stdin.read()
"""


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_folder_appears_whole_with_its_last_file(tmp_path):
    with Output(tmp_path / "new/out", {"a": 1}) as output:
        output.write("one", [b"1", memoryview(b"23")])
        output.write_json("sub/two.json", {"x": [1, 2]})
        assert not (tmp_path / "new/out").exists()
        assert output.has("one") and not output.has("two")
    assert files_of(tmp_path / "new/out") == {
        "one": b"123", "sub/two.json": b'{\n  "x": [\n    1,\n    2\n  ]\n}\n'
    }
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with Output(tmp_path / "out") as output:
        output.write("one", [b"1"])
    assert files_of(tmp_path / "out") == {"one": b"1"}


@pytest.mark.parametrize("plan", [None, {"a": 1}])
def test_second_process_is_refused_until_the_first_is_done_or_dead(plan, tmp_path):
    out = tmp_path / "out"
    first = subprocess.Popen(
        [sys.executable, "-c", WRITE, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert first.stdout.readline() == b"writing\n"
    before = files_of(tmp_path)
    with pytest.raises(InputError, match="nobody else.*another process.*wait for it or choose"):
        Output(out, plan).__enter__()
    assert files_of(tmp_path) == before
    first.kill()
    first.communicate()
    with Output(out, plan) as output:
        assert output.has("one") == (plan is not None)
    assert files_of(out) == ({"one": b"1"} if plan else {})


def test_two_in_one_process_are_two(tmp_path):
    with Output(tmp_path / "out", {}), pytest.raises(InputError, match="nobody else"):
        Output(tmp_path / "out", {}).__enter__()
    assert (tmp_path / "out").is_dir()


def test_failure_keeps_what_a_plan_can_go_on_with(tmp_path):
    for plan in (None, {"a": 1}):
        with pytest.raises(KeyboardInterrupt), Output(tmp_path / "out", plan) as output:
            output.write("one", [b"1"])
            raise KeyboardInterrupt
        assert not (tmp_path / "out").exists()
        assert (tmp_path / ".out.partial").exists() == (plan is not None)
    with pytest.raises(InputError, match="unfinished conversion of the same input and flags"):
        Output(tmp_path / "out", {"a": 2}).__enter__()
    with Output(tmp_path / "out", {"a": 1}) as output:
        assert output.has("one")
    assert files_of(tmp_path / "out") == {"one": b"1"}


def test_half_a_file_has_not_its_name(tmp_path):
    def pieces():
        yield b"12"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Output(tmp_path / "out", {}) as output:
        output.write("one", pieces())
    with Output(tmp_path / "out", {}) as output:
        assert not output.has("one")
        output.write("one", [b"3"])
    assert files_of(tmp_path / "out") == {"one": b"3"}


def test_killed_between_the_name_and_the_end(tmp_path, monkeypatch):
    """All is there, and beside it what the conversion was of: the same one goes on at the end."""
    def killed(self, **_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", killed)
        with Output(tmp_path / "out", {"a": 1}) as output:
            output.write("one", [b"1"])
    assert set(files_of(tmp_path / "out")) == {"one", PLAN, LOCK}
    for plan in (None, {"a": 2}):
        with pytest.raises(InputError, match="expected a new folder"):
            Output(tmp_path / "out", plan)
    with Output(tmp_path / "out", {"a": 1}) as output:
        assert output.has("one")
    assert files_of(tmp_path / "out") == {"one": b"1"}


def test_paths_that_cannot_be_an_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_bytes(b"x")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "empty").mkdir()
    for path in ("full", "full/file", ".", "/", "new/..", "full/..", "dangling", "link"):
        with pytest.raises(InputError, match="expected a new folder"):
            Output(Path(path))
    for path in ("x" * 300, "full/file/out", "a\0b", "a\nb"):
        with pytest.raises(InputError, match="^output: ") as caught:
            Output(Path(path)).__enter__()
        assert len(str(caught.value).splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ["dangling", "empty", "full", "link"]
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    with Output(Path("../fine")) as output:  # a parent is no trouble
        output.write("one", [b"1"])
    assert files_of(tmp_path / "fine") == {"one": b"1"}


def test_full_disk_is_one_line(tmp_path):
    with small_files_only(1000), pytest.raises(InputError, match="^output: cannot write .*space"):
        with Output(tmp_path / "out") as output:
            output.write("one", [bytes(2000)])
    assert not list(tmp_path.iterdir())
