"""Damage to the files of a checkpoint is noticed, and the run goes on from the one before.

Orbax alone notices next to none of it. What is asserted for every fault: either the checkpoint is
refused, or its state comes back bit by bit.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_cases import cases
from saved_states import PLACE, assert_same, new_state, shapes_of

from dsv4_jax.checkpoint import UNLISTED, Checkpoints, check_checkpoint
from dsv4_jax.errors import InputError
from dsv4_jax.manifest import MANIFEST_FILE

pytestmark = pytest.mark.faults

CONFIG = {"model": {"vocab_size": 300}, "train": {"steps": 10}}
OPENED = 40  # of the faults, after which the workdir is opened and the state restored


def save(workdir: Path, *steps: int) -> None:
    checkpoints = Checkpoints(workdir, keep=2, config=CONFIG)
    for step in steps:
        checkpoints.save(step, new_state(step), PLACE)
    checkpoints.close()


def restored(workdir: Path) -> dict:
    """Open a workdir and return its state, which must be exactly that of the step it names."""
    checkpoints = Checkpoints(workdir, keep=2, config=CONFIG)
    state, place = checkpoints.restore(shapes_of(new_state(0)))
    expected = new_state(checkpoints.latest_step)
    checkpoints.close()
    assert place == PLACE
    assert_same(state, expected)
    return state


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A workdir with the checkpoints of steps 1 and 2."""
    workdir = tmp_path_factory.mktemp("run")
    save(workdir, 1, 2)
    return workdir


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def is_refused(folder: Path) -> bool:
    try:
        check_checkpoint(folder)
    except InputError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
        return True
    return False


def goes_on(saved: Path, copy: Path, refused: bool, capsys) -> None:
    """Open a copy: from step 1 if step 2 is refused, which is said and kept; else from step 2."""
    shutil.copytree(saved, copy, symlinks=True)
    assert int(restored(copy)["step"]) == (1 if refused else 2)
    said = capsys.readouterr().out
    assert said.count("\n") == said.count("DAMAGED") == refused
    if refused:
        (aside,) = (copy / "damaged_checkpoints").iterdir()
        assert files_of(aside) and "going on from step 1" in said
        save(copy, 2)  # the run comes to that step again
        assert int(restored(copy)["step"]) == 2


def test_every_flipped_bit_is_found(saved, tmp_path, capsys, record_property):
    """Each byte of the checkpoint is as likely; so are, further on, all files."""
    choose, count = random.Random(0), cases(200, 1000)
    folder = saved / "checkpoints" / "2"
    files = files_of(folder)
    sizes = [path.stat().st_size for path in files]
    by_size = choose.choices(files, sizes, k=count)
    unused = 0
    for number, path in enumerate(by_size + choose.choices(files, k=count // 5)):
        data = path.read_bytes()
        place, bit = choose.randrange(len(data)), 1 << choose.randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        refused = is_refused(folder)
        unused += not refused
        assert refused or str(path.relative_to(folder)) in UNLISTED, path
        if number < OPENED or not refused and unused <= OPENED:
            goes_on(saved, tmp_path / str(number), refused, capsys)
        path.write_bytes(data)
    assert not is_refused(folder)
    record_property("F5: flipped bits, found or in bytes that are never read", len(by_size))


# Damages some of the files of a step, given those of another too, and returns which.
Fault = Callable[[random.Random, list[Path], list[Path]], list[Path]]


def truncate(choose: random.Random, files: list[Path], _) -> list[Path]:
    path = choose.choice(files)
    path.write_bytes(path.read_bytes()[: choose.randrange(path.stat().st_size)])
    return [path]


def lengthen(choose: random.Random, files: list[Path], _) -> list[Path]:
    path = choose.choice(files)
    path.write_bytes(path.read_bytes() + choose.randbytes(choose.randrange(1, 100)))
    return [path]


def delete(choose: random.Random, files: list[Path], _) -> list[Path]:
    path = choose.choice(files)
    path.unlink()
    return [path]


def zero(choose: random.Random, files: list[Path], _) -> list[Path]:
    path = choose.choice(files)
    path.write_bytes(bytes(path.stat().st_size))
    return [path]


def swap(choose: random.Random, files: list[Path], _) -> list[Path]:
    contents = {path.read_bytes(): path for path in files}
    (first, a), (second, b) = choose.sample(sorted(contents.items()), 2)
    a.write_bytes(second)
    b.write_bytes(first)
    return [a, b]


def mix_steps(choose: random.Random, files: list[Path], others: list[Path]) -> list[Path]:
    """Put a file of another step in the place of this step's, or beside it."""
    known = {path.read_bytes() for path in files}
    path = choose.choice([path for path in others if path.read_bytes() not in known])
    target = Path(str(path).replace("/checkpoints/1/", "/checkpoints/2/"))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(path.read_bytes())
    return [target]


def unreadable(choose: random.Random, files: list[Path], _) -> list[Path]:
    """Make the reading of a file fail with EIO, as a broken disk does."""
    path = choose.choice(files)
    path.unlink()
    path.symlink_to("/proc/self/mem")
    return [path]


@pytest.mark.parametrize(
    "fault", [truncate, lengthen, delete, zero, swap, mix_steps, unreadable],
    ids=lambda fault: fault.__name__,
)
def test_every_other_damage_is_found(fault: Fault, saved, tmp_path, capsys, record_property):
    choose, count = random.Random(fault.__name__), cases(10, 30)
    for number in range(count):
        workdir = tmp_path / str(number)
        shutil.copytree(saved, workdir)
        one, two = (workdir / "checkpoints" / step for step in "12")
        damaged = fault(choose, files_of(two), files_of(one))
        refused = is_refused(two)
        assert refused or {str(path.relative_to(two)) for path in damaged} <= UNLISTED
        goes_on(workdir, tmp_path / f"{number}-copy", refused, capsys)
    record_property(f"F6: {fault.__name__.replace('_', ' ')}", count)


@pytest.mark.parametrize("content", [
    b"", b"{}", b"[]", b"null", b'"files"', b"\xff", 100_000 * b"[", b'{"files": 3, "sha256": ""}',
])
def test_a_manifest_that_is_none_is_refused(content, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "2"
    (folder / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(InputError, match=f"{MANIFEST_FILE}: is damaged itself"):
        check_checkpoint(folder)


def test_another_step_s_folder_is_refused(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "2"
    with pytest.raises(InputError, match="expected step 3, got that of 2"):
        check_checkpoint(folder.rename(folder.with_name("3")))


def test_arrays_that_were_written_wrong_are_not_used(tmp_path, monkeypatch, capsys):
    """The manifest has fingerprints of what was in memory: the files must decode to that."""
    save(tmp_path, 1)
    original = Checkpoints._restore

    def restore(self, **items):
        found = original(self, **items)
        if self.latest_step == 2 and "state" in items:
            found["state"]["weight"] = found["state"]["weight"].at[3, 5].add(1e-3)
        return found

    save(tmp_path, 2)
    monkeypatch.setattr(Checkpoints, "_restore", restore)
    assert int(restored(tmp_path)["step"]) == 1
    assert "its arrays are not those that were saved" in capsys.readouterr().out


def test_if_all_are_damaged_nothing_is_moved_and_the_newest_is_named(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    for step in "12":
        (tmp_path / "run" / "checkpoints" / step / "data" / "metadata").write_bytes(b"{}")
    before = {path: path.read_bytes() for path in files_of(tmp_path)}
    with pytest.raises(InputError, match=r"expected an undamaged .*/2: not as .*data/metadata: "):
        restored(tmp_path / "run")
    assert {path: path.read_bytes() for path in files_of(tmp_path)} == before
