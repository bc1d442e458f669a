"""Save and restore training runs: parameters, optimizer state and the place in the data."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dsv4_jax.errors import InputError
from dsv4_jax.files import check_writable
from dsv4_jax.params import path_name

# What a run may not change when it continues: these shape the state or the order of the data.
FIXED_KEYS = ("model", "data.source", "data.text_field", "data.tokenizer", "data.seq_len",
              "data.batch_size", "data.seed", "data.held_out_fraction", "optimizer.name",
              "optimizer.train_indexer")
# Else an array of one device is one chunk, of up to 2 GB, and to read a layer is to read all of it.
CHUNK_BYTES = 64 * 2**20
STACKS = ("pairs", "experts")  # names of subtrees whose arrays are stacks


class Checkpoints:
    """The checkpoints of one workdir, written in the background, newest kept.

    Args:
      config: of the run, as JSON types; it is saved with every checkpoint.
    Raises:
      InputError: the newest checkpoint is of a run that differs in `FIXED_KEYS`, or is damaged;
        the folder cannot be read or written.
    """

    def __init__(self, workdir: Path, *, keep: int, config: dict):
        folder = workdir.absolute() / "checkpoints"
        check_writable(folder)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._config, self._writing = config, False
        with explained(f"cannot open {folder}", "mend the folder or choose another --workdir"):
            self._manager = ocp.CheckpointManager(folder, options=options)
            self.latest_step: int | None = self._manager.latest_step()  # of a complete checkpoint
        if self.latest_step is not None:
            saved = self._restore(self.latest_step, config=ocp.args.JsonRestore())["config"]
            check_same_run(saved, config, str(folder / str(self.latest_step)))

    def save(self, step: int, state: Any, place: dict) -> None:
        """Start to write a checkpoint; it appears under its name only when it is complete.

        Blocks until the state is computed and, where it is on an accelerator, copied to the
        host. On CPU the file is written from the state's own buffers; a step that the state is
        donated to leaves these alone and takes new ones, because they are still referred to.

        Args:
          place: in the data, `TrainIterator.get_state()`.
        Raises:
          InputError: this write or the one before, in the background, failed.
        """
        # The place is the same on every host, so it is plain JSON, not grain's file per host: a
        # run may go on with another number of hosts.
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state, jax.tree_util.tree_map_with_path(_chunked, state)),
            data=ocp.args.JsonSave(place),
            config=ocp.args.JsonSave(self._config),
        )
        jax.block_until_ready(state)  # an error of the computation is none of the disk
        with self._explain_failed_save():
            self._manager.save(step, args=items)
        self._writing = True

    def check(self) -> None:
        """Tell, without waiting for it, that the last write has failed.

        Raises:
          InputError: it has.
        """
        if self._writing and not self._manager.is_saving_in_progress():
            self._writing = False
            with self._explain_failed_save():
                self._manager.wait_until_finished()

    def restore(self, like: Any) -> tuple[Any, dict]:
        """Return the state and the place in the data of the latest step.

        Args:
          like: the tree of shapes, dtypes and shardings that the state is to have.
        Raises:
          InputError: the checkpoint is damaged.
        """
        restored = self._restore(
            self.latest_step, state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore()
        )
        return restored["state"], restored["data"]

    def close(self) -> None:
        """Wait for the last write and stop writing.

        Raises:
          InputError: that write failed.
        """
        try:
            with self._explain_failed_save():
                self._manager.wait_until_finished()
        finally:
            self._manager.close()

    def _explain_failed_save(self) -> contextlib.AbstractContextManager[None]:
        return explained(
            f"cannot write a checkpoint to {self._manager.directory}",
            "make room or mend the disk, and start again: the run goes on from the checkpoint "
            "before",
        )

    def _restore(self, step: int, **items) -> dict[str, Any]:
        where = self._manager.directory / str(step)
        remedy = (
            "move that folder away to go on from the checkpoint before, if there is one; if the "
            "code has changed since, choose another --workdir"
        )
        with explained(f"cannot read the checkpoint {where}", remedy):
            return self._manager.restore(step, args=ocp.args.Composite(**items))


def _chunked(path: tuple, _) -> ocp.SaveArgs:
    """Divide an array into chunks, each of one layer and one expert."""
    stacked = sum(name in STACKS for name in path_name(path).split("/"))
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=tuple(range(stacked)))


@contextlib.contextmanager
def explained(failure: str, remedy: str) -> Iterator[None]:
    """Turn what Orbax and TensorStore raise of disks and damaged files into an InputError.

    They raise OSError, ValueError, JSONDecodeError (a ValueError) and Exception itself.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError | ValueError) and type(error) is not Exception:
            raise
        reason = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")
        raise InputError(f"{failure}: {reason}; {remedy}") from error


def check_same_run(saved: dict, config: dict, where: str) -> None:
    """Raise an InputError that names the first fixed key in which two configs differ."""
    flat_saved, flat_config = _flatten(saved), _flatten(config)
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
