"""When a disk fails the last good checkpoint stays, and the next one is made as if it had not."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from faults import small_files_only
from orbax.checkpoint import path as orbax_path
from saved_states import PLACE, assert_same, new_state, shapes_of
from training_command import committed_steps

from dsv4_jax import manifest
from dsv4_jax.checkpoint import Checkpoints
from dsv4_jax.errors import InputError

pytestmark = [
    pytest.mark.faults,
    # Where one file cannot be written, Orbax drops TensorStore's answers about the others.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

CONFIG = {"model": {"vocab_size": 300}}


def opened(workdir: Path) -> Checkpoints:
    return Checkpoints(workdir, keep=2, config=CONFIG)


def save(workdir: Path, step: int) -> None:
    checkpoints = opened(workdir)
    checkpoints.save(step, new_state(step), PLACE)
    checkpoints.close()


def assert_saved(workdir: Path, step: int) -> None:
    checkpoints, expected = opened(workdir), new_state(step)
    assert checkpoints.latest_step == step
    state, _ = checkpoints.restore(shapes_of(expected))
    checkpoints.close()
    assert_same(state, expected)


def fail(code: int):
    def raise_error(*_, **__):
        raise OSError(code, os.strerror(code))

    return raise_error


def full_disk(size: int):
    return pytest.param(lambda patch: small_files_only(size), id=f"files-of-{size}-bytes")


def failing(code: int, holder, name: str):
    def enter(patch):
        patch.setattr(holder, name, fail(code))
        return patch.context()

    return pytest.param(enter, id=f"{errno.errorcode[code]}-{name}")


CODES = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@pytest.mark.parametrize("fault", [
    *(full_disk(size) for size in (1, 50, 300, 1000, 5000, 20_000, 100_000, 200_000)),
    *(failing(code, manifest, "write_atomically") for code in CODES),
    *(failing(code, manifest, "_digests") for code in CODES),
    *(failing(code, orbax_path.atomicity.async_path, "rename") for code in CODES),
])
def test_a_failed_write_is_told_and_the_next_one_succeeds(
    fault, tmp_path, monkeypatch, record_property
):
    save(tmp_path, 1)
    checkpoints = opened(tmp_path)
    with monkeypatch.context() as patch, fault(patch):
        with pytest.raises(InputError, match=r"cannot write a checkpoint to .*; make") as caught:
            checkpoints.save(2, new_state(2), PLACE)
            while True:
                checkpoints.check()
    assert "\n" not in str(caught.value)
    assert committed_steps(tmp_path) == [1]
    checkpoints.save(3, new_state(3), PLACE)
    checkpoints.close()
    assert committed_steps(tmp_path) == [1, 3]
    assert_saved(tmp_path, 3)
    record_property("F7, F8: a write that fails, told at once; the next one succeeds", 1)


def test_the_newest_is_read_again_before_older_ones_are_deleted(tmp_path, monkeypatch):
    save(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path, keep=1, config=CONFIG)
    write = manifest.write_manifest

    def write_and_damage(folder: Path, facts: dict) -> None:
        write(folder, facts)
        (folder / "data" / "metadata").write_bytes(b"{}")

    monkeypatch.setattr("dsv4_jax.checkpoint.write_manifest", write_and_damage)
    with pytest.raises(InputError, match="data/metadata: its bytes are not those"):
        checkpoints.save(2, new_state(2), PLACE)
        checkpoints.close()
    assert_saved(tmp_path, 1)


def test_a_write_that_hangs_is_told(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=2, config=CONFIG, patience=0.0)
    monkeypatch.setattr(checkpoints._manager, "is_saving_in_progress", lambda: True)
    checkpoints.save(1, new_state(1), PLACE)
    with pytest.raises(InputError, match="expected a checkpoint to be written within 0 s, got"):
        checkpoints.check()
    checkpoints.close()
