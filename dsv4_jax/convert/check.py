"""Compare the tensors of a checkpoint with those that its configuration asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from dsv4_jax.config import ModelConfig
from dsv4_jax.convert.names import SCALE_SUFFIXES, FileTensor, scale_name
from dsv4_jax.convert.storage import CODES, FORMS, form_of, stored_shapes
from dsv4_jax.convert.table import INTEGER
from dsv4_jax.convert.tensor_files import Entry
from dsv4_jax.convert.untrusted import raise_all
from dsv4_jax.errors import InputError, shown
from dsv4_jax.quant import FP4, Format

FLOATS = ("BF16", "F16", "F32")
ADMITTED = {
    kind: (*(code for form in forms for code in CODES[form]), *FLOATS)
    for kind, forms in FORMS.items()
} | {INTEGER: ("I64", "I32")}  # by kind; of all other kinds FLOATS


def check_entries(
    folder: Path, entries: Mapping[str, Entry], files: Iterable[FileTensor]
) -> dict[str, Entry]:
    """Check that all tensors are there, with shapes and dtypes that go together, and no others.

    Returns:
      The scales of quantised tensors, by the names of the tensors.
    Raises:
      CheckpointError: every tensor that is missing, unexpected, mis-shaped or mis-typed.
    """
    problems, used, scales = [], set(), {}
    for file in files:
        entry = entries.get(file.name)
        names = dict.fromkeys(scale_name(file.name, suffix) for suffix in SCALE_SUFFIXES)
        found = [name for name in names if name in entries]
        used.add(file.name)
        if faults := _check_kind(file, entry):
            problems += faults
            used.update(found)  # nothing can be said about the scales of such a tensor
            continue
        form = form_of(entry.dtype)
        shape, *_ = stored_shapes(file.tensors[0].shape, form)
        problems += _check_shape(file.name, entry, file, shape)
        if form is None:
            continue
        used.update(found)
        if len(found) != 1:
            problems.append(
                f"tensor {file.name!r}: expected its scales as {' or '.join(names)}, got "
                f"{'both' if found else 'none'}"
            )
            continue
        scales[file.name] = entries[found[0]]
        problems += _check_scales(found[0], scales[file.name], form, file)
    problems += [f"tensor {shown(name)}: unexpected" for name in entries if name not in used]
    raise_all(folder, problems)
    return scales


def _check_kind(file: FileTensor, entry: Entry | None) -> list[str]:
    if entry is None:
        return [f"tensor {file.name!r}: missing"]
    return _check_dtype(file.name, entry, ADMITTED.get(file.tensors[0].kind, FLOATS))


def _check_scales(name: str, entry: Entry, form: Format, file: FileTensor) -> list[str]:
    shape = file.tensors[0].shape
    problems = _check_dtype(name, entry, ("F8_E8M0",) if form is FP4 else ("F8_E8M0", "F32"))
    if problems:
        return problems
    return _check_shape(name, entry, file, stored_shapes(shape, form)[1])


def _check_dtype(name: str, entry: Entry, admitted: tuple[str, ...]) -> list[str]:
    if entry.dtype in admitted:
        return []
    return [f"tensor {name!r}: expected {' or '.join(admitted)}, got {entry.dtype}"]


def _check_shape(name: str, entry: Entry, file: FileTensor, shape: tuple[int, ...]) -> list[str]:
    expected = file.shape(shape)
    if entry.shape == expected:
        return []
    return [f"tensor {name!r}: expected shape {list(expected)}, got {shown(list(entry.shape))}"]


def check_table(table: np.ndarray, config: ModelConfig) -> None:
    """Raise an InputError unless a hash-routing table has ids of experts alone."""
    if table.min() < 0 or table.max() >= config.n_routed_experts:
        raise InputError(
            f"expected ids of {config.n_routed_experts} experts, got {table.min()} to {table.max()}"
        )
