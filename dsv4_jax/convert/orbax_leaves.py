"""Write and read Orbax checkpoints slice by slice, so that no array need be whole in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax.traverse_util import unflatten_dict

from dsv4_jax.checkpoint import CHUNK_BYTES, explained
from dsv4_jax.errors import InputError

IN_FLIGHT_BYTES = 32 * 2**20  # of pieces of slices that are written at once, beside the next
CACHED_CHUNKS = 4  # of a checkpoint that is read, counted in its largest chunks


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """An array that is to be written, and how to come by its values."""

    shape: tuple[int, ...]
    dtype: np.dtype
    slice_axes: int  # leading axes over which it comes in slices; 0: it comes whole
    # From the leading index to an array of shape[slice_axes:], which must not change any more.
    read: Callable[[tuple[int, ...]], np.ndarray]


def write_leaves(folder: Path, leaves: Mapping[str, LeafPlan]) -> None:
    """Write an Orbax checkpoint that holds at most a few slices in memory.

    It is what `ocp.StandardCheckpointer` restores, uncompressed because weights hardly compress.
    The folder appears only when it is complete; what a killed attempt has left beside it is
    removed. One process writes.

    Args:
      leaves: by path in a nested dict, as "a/b/c".
    Raises:
      InputError: the folder exists or cannot be written.
      Exception: whatever `read` raised.
    """
    folder = folder.absolute()
    if os.path.lexists(folder):
        raise InputError(f"{folder}: expected no such folder yet, got one; move it away")
    handlers = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.get_type_handler(jax.Array)),  # else Orbax warns
        (LeafPlan, _SliceWriter()),
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers, use_compression=False)
    tree = ocp.args.PyTreeSave(unflatten_dict(dict(leaves), sep="/"))
    with ocp.Checkpointer(handler) as checkpointer:
        unfinished = checkpointer.get_temporary_path(folder).get()
        try:
            with explained(f"cannot write {folder}", "make room or choose another folder"):
                checkpointer.save(folder, args=tree)
        except _ReadError as error:
            raise error.reason from error.reason.__cause__
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)  # there is none after success


class _ReadError(Exception):
    """Carries what `read` raised through Orbax, apart from what Orbax itself raises."""

    def __init__(self, reason: Exception):
        super().__init__(reason)
        self.reason = reason


class _SliceWriter(ocp.type_handlers.NumpyHandler):
    """Writes a `LeafPlan`; Orbax's files call it a NumPy array, which it is when it is read."""

    async def serialize(
        self, values: Sequence[LeafPlan], infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> list:
        """Write, and leave nothing to be done in the background."""
        for number, (plan, info) in enumerate(zip(values, infos, strict=True)):
            await info.await_path_creation()
            spec = ocp.type_handlers.get_json_tspec_write(
                info, use_ocdbt=True, dtype=plan.dtype, global_shape=plan.shape,
                local_shape=(1,) * plan.slice_axes + plan.shape[plan.slice_axes :],
                arg=ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES),
                # As if each leaf came from another process: it gets an index of its own, for every
                # slice rewrites the index that it is in. Orbax joins them at the end.
                process_index=number,
            )
            store = await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)
            _write_slices(store, plan)
        return []


def _write_slices(store: ts.TensorStore, plan: LeafPlan) -> None:
    writes, pending = deque(), 0
    try:
        for place, values in _pieces(store, plan):
            while writes and pending + values.nbytes > IN_FLIGHT_BYTES:
                write, nbytes = writes.popleft()
                write.result()
                pending -= nbytes
            write = store[place].write(values, can_reference_source_data_indefinitely=True)
            writes.append((write, values.nbytes))
            pending += values.nbytes
        while writes:
            writes.popleft()[0].result()
    finally:
        for write, _ in writes:  # after a failure: none may outlive the folder
            write.exception()


def _pieces(store: ts.TensorStore, plan: LeafPlan) -> Iterator[tuple[tuple, np.ndarray]]:
    """Yield rows of slices, as many as make whole chunks, and their places in the array."""
    for index in np.ndindex(plan.shape[: plan.slice_axes]):
        values = _read(plan, index)
        if not values.ndim:
            yield index, values
            continue
        rows = store.chunk_layout.write_chunk.shape[plan.slice_axes]
        for start in range(0, len(values), rows):
            yield (*index, slice(start, start + rows)), values[start : start + rows]


def _read(plan: LeafPlan, index: tuple[int, ...]) -> np.ndarray:
    try:
        values = plan.read(index)
        expected, found = (plan.shape[plan.slice_axes :], plan.dtype), (values.shape, values.dtype)
        if expected != found:  # TensorStore would broadcast or cast it
            raise ValueError(f"slice {index}: expected shape and dtype {expected}, got {found}")
        return values
    except Exception as error:
        raise _ReadError(error) from error


class StoredLeaf:
    """An array of a checkpoint, of which each reading of a part reads the chunks that it is in."""

    def __init__(self, metadata: ocp.metadata.ArrayMetadata, info: ocp.type_handlers.ParamInfo):
        self.shape, self.dtype = metadata.shape, np.dtype(metadata.dtype)
        self._info = info

    def __getitem__(self, index: int | slice | tuple[int | slice, ...]) -> np.ndarray:
        """Return a part as NumPy does, for integers and slices with positive steps.

        Raises:
          InputError: the files are damaged or cannot be read.
        """
        index = index if isinstance(index, tuple) else (index,)
        if len(index) > len(self.shape):
            raise IndexError(f"expected at most {len(self.shape)} indices, got {len(index)}")
        place = tuple(map(_within, index, self.shape))
        with _explain_failed_read(f"{self._info.name} in {self._info.parent_dir}"):
            return np.asarray(self._store[place].read().result())

    @functools.cached_property
    def _store(self) -> ts.TensorStore:
        info = self._info
        spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=info.is_ocdbt_checkpoint)
        return ts.open(ts.Spec(spec), open=True, context=info.ts_context).result()


def _within(part: int | slice, size: int) -> int | slice:
    """Put an index in the bounds of an axis; TensorStore does not count from the end."""
    if not isinstance(part, slice):
        return range(size)[part]
    start, stop, step = part.indices(size)
    if step < 1:
        raise IndexError(f"expected a slice with a positive step, got {part}")
    return slice(start, max(start, stop), step)


def open_leaves(folder: Path) -> dict[str, StoredLeaf]:
    """Return the arrays and numbers of an Orbax checkpoint, by path, without reading them.

    Args:
      folder: that `write_leaves` or `ocp.StandardCheckpointer` wrote, or of the state in a
        training checkpoint.
    Raises:
      InputError: it is none, is damaged or cannot be read.
    """
    folder = folder.absolute()
    with _explain_failed_read(str(folder)):
        described = ocp.StandardCheckpointHandler().metadata(folder)
        is_ocdbt = ocp.type_handlers.is_ocdbt_checkpoint(folder)
    arrays = {
        path: leaf for path, leaf in ocp.tree.to_flat_dict(described.tree, sep="/").items()
        if isinstance(leaf, ocp.metadata.ArrayMetadata)
    }
    chunks = [
        math.prod(leaf.storage.chunk_shape) * leaf.dtype.itemsize
        for leaf in arrays.values() if leaf.storage  # Orbax tells none of Python's numbers
    ]  # fmt: skip
    # A chunk may hold many slices, up to 2 GB of them where another program wrote: those that are
    # read from it in turn must not decode it each time.
    context = ts.Context(
        {"cache_pool": {"total_bytes_limit": CACHED_CHUNKS * max(chunks, default=0)}},
        parent=ocp.type_handlers.get_ts_context(use_ocdbt=is_ocdbt),
    )
    return {
        path: StoredLeaf(leaf, ocp.type_handlers.ParamInfo(
            name=leaf.name, parent_dir=folder, is_ocdbt_checkpoint=is_ocdbt,
            use_zarr3=described.use_zarr3, ts_context=context,
        ))
        for path, leaf in arrays.items()
    }  # fmt: skip


@contextlib.contextmanager
def _explain_failed_read(what: str) -> Iterator[None]:
    """Turn what Orbax and TensorStore raise of damaged files into an InputError."""
    with explained(f"cannot read {what}", "expected a whole Orbax checkpoint: copy it again"):
        try:
            yield
        except (AttributeError, LookupError, TypeError) as error:  # of JSON that it does not expect
            raise ValueError(f"damaged: {error!r}") from error
