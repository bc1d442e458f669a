"""Save and restore training runs: parameters, optimizer state and the place in the data.

Orbax writes a checkpoint into a temporary folder, in the background, and gives the folder its name
when it is complete. Before that we add a manifest (`manifest.py`), as Orbax notices no damage to
its files: of 300 restores after one flipped bit, all were silently wrong. What a checkpoint does
not match is not used; the run goes on from the one before.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dsv4_jax.checksum import fingerprints
from dsv4_jax.errors import InputError
from dsv4_jax.files import check_writable
from dsv4_jax.manifest import check_manifest, write_manifest
from dsv4_jax.params import path_name
from dsv4_jax.run_config import defaults
from dsv4_jax.terminal import say

# What a run may not change when it continues: these shape the state or the order of the data.
# (The data's place refuses other stages, where they have begun.)
FIXED_KEYS = ("model", "data.source", "data.format", "data.text_field", "data.thinking",
              "data.tokenizer", "data.seed", "data.held_out_fraction", "optimizer.name")
# Else an array of one device is one chunk, of up to 2 GB, and to read a layer is to read all of it.
CHUNK_BYTES = 64 * 2**20
STACKS = ("pairs", "experts")  # names of subtrees whose arrays are stacks
CHECKPOINTS, DAMAGED = "checkpoints", "damaged_checkpoints"  # in a workdir
# Written when the folder gets its name, and never read on file systems that can rename.
UNLISTED = frozenset({ocp.path.atomicity.COMMIT_SUCCESS_FILE})
DELETED_SUFFIX = ".orbax-checkpoint-tmp"  # what Orbax removes when it opens the folder


class Checkpoints:
    """The checkpoints of one workdir, written in the background, newest kept.

    Opening finds the newest undamaged one. Newer ones are moved to `damaged_checkpoints`.

    Args:
      keep: how many newest are kept. An older one is deleted when a newer is complete and its
        files have been read again.
      config: of the run, as JSON types; it is saved with every checkpoint.
      patience: seconds that one may take to be written.
    Raises:
      InputError: the newest checkpoint is of a run that differs in `FIXED_KEYS`; all are damaged;
        the folder cannot be read or written.
    """

    def __init__(self, workdir: Path, *, keep: int, config: dict, patience: float = 1800):
        self._folder = workdir.absolute() / CHECKPOINTS
        check_writable(self._folder)
        self._config, self._keep, self._patience = config, keep, patience
        self._since: float | None = None  # when the write that may still go on began
        self._saved: tuple[Callable, dict | None] | None = None  # what is being written
        self._damaged: dict[int, str] = {}  # what is wrong, by step, until these are moved away
        self.latest_step, self._manifest = self._newest_undamaged()
        self._manager = self._open_manager()
        if self.latest_step is not None:
            saved = self._restore(config=ocp.args.JsonRestore())["config"]
            check_same_run(saved, config, str(self._where(self.latest_step)))
        self._move_damaged_away()

    def save(self, step: int, state: Any, place: dict, routed: list | None = None) -> None:
        """Start to write a checkpoint; it appears under its name only when it is complete.

        Blocks until the state is computed and, where it is on an accelerator, copied to the
        host, and until the write before is complete. On CPU the file is written from the state's
        own buffers; a step that the state is donated to leaves these alone and takes new ones,
        because they are still referred to.

        Args:
          place: in the data, `TrainIterator.get_state()`, and what else is plain JSON.
          routed: the experts of batches ahead, if any.
        Raises:
          InputError: this write or the one before, in the background, failed; its state had
            infinities or NaNs.
        """
        # The place is the same on every host, so it is plain JSON, not grain's file per host: a
        # run may go on with another number of hosts.
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state, jax.tree_util.tree_map_with_path(_chunked, state)),
            data=ocp.args.JsonSave(place),
            config=ocp.args.JsonSave(self._config),
            **({"routed": ocp.args.StandardSave(routed)} if routed else {}),
        )
        jax.block_until_ready(state)  # an error of the computation is none of the disk
        self._wait()
        self._saved = fingerprints(state), place.get("identity")
        with self._explain_failed_save():
            self._manager.save(step, args=items, force=True)
        self._since = time.monotonic()

    def check(self) -> None:
        """Tell, without waiting for it, that the last write has failed or hangs.

        Raises:
          InputError: it does.
        """
        if self._since is None:
            return
        if not self._manager.is_saving_in_progress():
            self._wait()
        elif time.monotonic() - self._since > self._patience:
            raise InputError(
                f"{self._folder}: expected a checkpoint to be written within "
                f"{self._patience:.0f} s, got none yet; look at the disk, and start again: the "
                "run goes on from the checkpoint before"
            )

    def restore(self, like: Any) -> tuple[Any, dict]:
        """Return the state and the place in the data of the latest undamaged step.

        Args:
          like: the tree of shapes, dtypes and shardings that the state is to have.
        Raises:
          InputError: the state has other leaves, shapes or dtypes; what was read is not what was
            saved, and so with every checkpoint before.
        """
        while True:
            check_leaves(self._manifest["leaves"], like, str(self._where(self.latest_step)))
            restored = self._restore(
                state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore()
            )
            if fingerprints(restored["state"])() == self._manifest["leaves"]:
                return restored["state"], restored["data"]
            # The files are those that were written, so that they were wrong from the start.
            reason = "its arrays are not those that were saved"
            self._damaged[self.latest_step] = f"{self._where(self.latest_step)}: {reason}"
            self.latest_step, self._manifest = self._newest_undamaged()
            self._move_damaged_away()

    def restore_routed(self, like: list) -> list:
        """Return the experts of batches ahead that were saved with the state."""
        return self._restore(routed=ocp.args.StandardRestore(like))["routed"]

    def go_back(self, step: int) -> int | None:
        """Make the newest undamaged checkpoint up to a step, or else the oldest, the latest one.

        Returns its step, or None if there is no checkpoint.
        """
        self._wait()
        older = [s for s in _steps(self._folder) if s <= step] or sorted(_steps(self._folder))[:1]
        self.latest_step, self._manifest = self._newest_undamaged(older)
        self._move_damaged_away()
        return self.latest_step

    def close(self) -> None:
        """Wait for the last write and stop writing.

        Raises:
          InputError: that write failed.
        """
        try:
            self._wait()
        finally:
            self._manager.close()

    def _wait(self) -> None:
        self._since = None
        with self._explain_failed_save():
            self._manager.wait_until_finished()

    def _open_manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None, enable_async_checkpointing=True, cleanup_tmp_directories=True,
            lightweight_initialize=True,
            temporary_path_class=_sealing(self._folder, self._describe, self._remove_old),
        )
        remedy = "mend the folder or choose another --workdir"
        with explained(f"cannot open {self._folder}", remedy):
            return ocp.CheckpointManager(self._folder, options=options)

    def _where(self, step: int) -> Path:
        return self._folder / str(step)

    def _newest_undamaged(
        self, steps: Iterable[int] | None = None
    ) -> tuple[int | None, dict | None]:
        """Find the newest checkpoint that its manifest confirms; note the damaged ones before it.

        Args:
          steps: of the checkpoints to look at; None: all.
        Raises:
          InputError: there are checkpoints and all are damaged.
        """
        steps = _steps(self._folder) if steps is None else steps
        for step in sorted(set(steps) - set(self._damaged), reverse=True):
            try:
                return step, check_checkpoint(self._where(step))
            except InputError as error:
                self._damaged[step] = str(error)
        if self._damaged:
            raise InputError(
                f"{self._folder}: expected an undamaged checkpoint, got none: "
                f"{self._damaged[max(self._damaged)]}; bring back a copy of that folder, or choose "
                "another --workdir"
            )
        return None, None

    def _move_damaged_away(self) -> None:
        if not self._damaged:
            return
        for step, reason in self._damaged.items():
            aside = self._folder.with_name(DAMAGED)
            aside.mkdir(exist_ok=True)
            target = aside / f"{step}-{time.time_ns()}"
            self._where(step).rename(target)
            say(f"DAMAGED: {reason}; moved to {target}, going on from step {self.latest_step}")
        self._damaged.clear()
        self._manager.reload()

    def _remove_old(self, step: int) -> None:
        """Delete what a new checkpoint makes superfluous, after it has been read again."""
        check_checkpoint(self._where(step))
        for old in sorted(_steps(self._folder))[: -self._keep]:
            # Under this name a folder that is half deleted is none of a checkpoint.
            doomed = self._where(old).rename(self._folder / f"{old}{DELETED_SUFFIX}")
            shutil.rmtree(doomed)

    def _describe(self, step: int) -> dict[str, Any]:
        """Return what the manifest is to say of the state that is being written.

        Raises:
          InputError: it has infinities or NaNs.
        """
        leaves, data = self._saved[0](), self._saved[1]
        self._saved = None  # the arrays are not needed any more
        bad = [name for name, leaf in leaves.items() if leaf["non_finite"]]
        if bad:
            raise InputError(
                f"state of step {step}: expected finite values, got infinities or NaNs in "
                f"{len(bad)} arrays, {bad[0]} the first; it is not saved: start again from the "
                "checkpoint before, with a lower learning rate if it happens again"
            )
        return {
            "step": step, "leaves": leaves, "data": data,
            "config_sha256": hashlib.sha256(_canonical(self._config)).hexdigest(),
            "versions": _versions(),
        }

    @contextlib.contextmanager
    def _explain_failed_save(self) -> Iterator[None]:
        remedy = (
            "make room or mend the disk, and start again: the run goes on from the checkpoint "
            "before"
        )
        try:
            with explained(f"cannot write a checkpoint to {self._folder}", remedy):
                yield
        except InputError:
            # One of Orbax's threads has failed; the others must not go on with that checkpoint.
            with contextlib.suppress(Exception):
                self._manager.close()
            self._manager = self._open_manager()
            raise

    def _restore(self, **items) -> dict[str, Any]:
        where = self._where(self.latest_step)
        remedy = (
            "move that folder away to go on from the checkpoint before, if there is one; if the "
            "code has changed since, choose another --workdir"
        )
        with explained(f"cannot read the checkpoint {where}", remedy):
            return self._manager.restore(self.latest_step, args=ocp.args.Composite(**items))


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint's folder after comparing the two.

    Raises:
      InputError: the folder is damaged, or has another step's content.
    """
    manifest = check_manifest(folder, UNLISTED)
    if str(manifest.get("step")) != folder.name:
        raise InputError(f"{folder}: expected step {folder.name}, got that of {manifest['step']}")
    return manifest


def check_leaves(saved: dict[str, dict], like: Any, where: str) -> None:
    """Raise an InputError that names the first leaf in which a saved state is another one.

    Orbax would cast it.
    """
    expected = {
        path_name(path): {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}
        for path, leaf in jax.tree_util.tree_leaves_with_path(like)
    }
    for name in sorted(saved | expected):
        found = {key: saved[name][key] for key in ("dtype", "shape")} if name in saved else None
        if found != expected.get(name):
            raise InputError(
                f"{name}: expected {_described(found)}, as in the checkpoint {where}, got "
                f"{_described(expected.get(name))} by the config; set it back or choose another "
                "--workdir"
            )


def _described(leaf: dict | None) -> str:
    return "nothing" if leaf is None else f"{leaf['dtype']}{leaf['shape']}"


def committed_steps(workdir: Path) -> set[int]:
    """Return the steps of the checkpoints in a workdir, of which some may be damaged."""
    folder = workdir / CHECKPOINTS
    return _steps(folder) if folder.is_dir() else set()


def _steps(folder: Path) -> set[int]:
    return {int(path.name) for path in folder.iterdir() if path.name.isdecimal()}


def _sealing(
    folder: Path, facts_of: Callable[[int], dict], after: Callable[[int], None]
) -> type[ocp.path.atomicity.AtomicRenameTemporaryPath]:
    """Make the class of temporary folders that get a manifest before they get their name.

    Args:
      facts_of: what the manifest of a step is to say.
      after: called when a step's folder has its name, in the background still.
    """

    class Sealing(ocp.path.atomicity.AtomicRenameTemporaryPath):
        async def finalize(self) -> None:
            final = Path(self._final_path)
            if final.parent != folder:  # an item within a checkpoint
                return await super().finalize()
            if self._checkpoint_metadata_store is not None:
                # Orbax would stamp its metadata with the time after the manifest is written.
                await asyncio.to_thread(self._checkpoint_metadata_store.wait_until_finished)
                self._checkpoint_metadata_store = None
            step = int(final.name)
            await asyncio.to_thread(write_manifest, Path(self._tmp_path), facts_of(step))
            await super().finalize()
            await asyncio.to_thread(after, step)

    return Sealing


@functools.cache
def _versions() -> dict[str, str]:
    names = ("dsv4_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain")
    return {name: importlib.metadata.version(name) for name in names}


def _canonical(config: dict) -> bytes:
    return json.dumps(config, sort_keys=True).encode()


def _chunked(path: tuple, _) -> ocp.SaveArgs:
    """Divide an array into chunks, each of one layer and one expert."""
    stacked = sum(name in STACKS for name in path_name(path).split("/"))
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=tuple(range(stacked)))


@contextlib.contextmanager
def explained(failure: str, remedy: str) -> Iterator[None]:
    """Turn what Orbax and TensorStore raise of disks and damaged files into an InputError.

    They raise OSError, ValueError, JSONDecodeError (a ValueError) and Exception itself. An
    InputError stays as it is.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not isinstance(error, OSError | ValueError) and type(error) is not Exception:
            raise
        reason = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")
        raise InputError(f"{failure}: {reason}; {remedy}") from error


def check_same_run(saved: dict, config: dict, where: str) -> None:
    """Raise an InputError that names the first fixed key in which two configs differ.

    A key that is not there, as it was not yet when a config was saved, has its default.
    """
    usual = _flatten(defaults())
    flat_saved, flat_config = usual | _flatten(saved), usual | _flatten(config)
    for key in sorted(flat_saved | flat_config):
        if not any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED_KEYS):
            continue
        before, now = flat_saved.get(key), flat_config.get(key)
        if before != now:
            raise InputError(
                f"config.{key}: expected {before!r}, as in the checkpoint {where}, got {now!r}; "
                "set it back or choose another --workdir"
            )


def _flatten(config: dict) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, keys in config.items()
            for key, value in keys.items()}
