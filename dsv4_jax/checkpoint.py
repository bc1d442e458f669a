"""Save and restore training runs: parameters, optimizer state and the place in the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from dsv4_jax.data import TrainIterator
from dsv4_jax.errors import InputError

# What a run may not change when it continues: these shape the state or the order of the data.
FIXED_KEYS = ("model", "data.source", "data.text_field", "data.tokenizer", "data.seq_len",
              "data.batch_size", "data.seed", "data.held_out_fraction", "optimizer.name",
              "optimizer.train_indexer")


class Checkpoints:
    """The checkpoints of one workdir, written in the background, newest kept."""

    def __init__(self, workdir: Path, *, keep: int):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(workdir.absolute() / "checkpoints", options=options)

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, iterator: TrainIterator, config: dict) -> None:
        """Start to write a checkpoint; it appears under its name only when it is complete.

        Raises:
          OSError: an earlier write failed, for instance for want of space.
        """
        if step in self._manager.all_steps():
            return
        # The state of the data is the same on every host, so it is plain JSON, not grain's file
        # per host: a run may go on with another number of hosts.
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave(iterator.get_state()),
                config=ocp.args.JsonSave(config),
            ),
        )

    def restore(self, step: int, like: Any, iterator: TrainIterator, config: dict) -> Any:
        """Return the state saved at a step and put the iterator at its place.

        Args:
          like: the tree of shapes, dtypes and shardings that the state is to have.
          config: of the run that continues; it must agree with the saved one in `FIXED_KEYS`.
        Raises:
          InputError: the checkpoint was written with another config.
        """
        saved = self._manager.restore(
            step, args=ocp.args.Composite(config=ocp.args.JsonRestore())
        )["config"]
        check_same_run(saved, config, str(self._manager.directory / str(step)))
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore()
            ),
        )
        iterator.set_state(restored["data"])
        return restored["state"]

    def close(self) -> None:
        """Wait for the last write and stop writing."""
        self._manager.wait_until_finished()
        self._manager.close()


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
