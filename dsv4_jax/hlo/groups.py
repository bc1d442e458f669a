"""Groups of devices that exchange data, in the ways in which compiled programs write them."""

from __future__ import annotations

import functools
import math
import re

import numpy as np

from dsv4_jax.hlo.text import Instruction, Program

_GROUPS = re.compile(
    r"\b(?:source_target_pairs|replica_groups)="
    r"(\{\{.*?\}\}|\{\}|\[[0-9,]+\]<=\[[0-9,]+\](?:T\([0-9,]+\))?|mesh\[[^{]*\{[^}]*\})"
)


def groups_of(program: Program, instruction: Instruction) -> np.ndarray:
    """Return the devices that exchange data with each other: int[groups, devices of a group].

    Pairs of source and target count as groups of two.
    """
    found = _GROUPS.search(instruction.rest)
    return _groups(found[1] if found else "{}", program.devices)


@functools.lru_cache(maxsize=2**12)
def _groups(text: str, devices: int) -> np.ndarray:
    if text == "{}":
        return np.arange(devices)[None]
    if text.startswith("{{"):
        return _listed(text)
    if text.startswith("["):
        rows = _numbers(text.partition("<=")[0])
        return _iota(text.partition("<=")[2]).reshape(rows)
    return _named(text)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _listed(text: str) -> np.ndarray:
    """Read `{{0,1},{2,3}}`; shorter groups, which are rare, are filled up by their first."""
    rows = [_numbers(row) for row in text.split("},")]
    longest = max(map(len, rows))
    return np.array([row + row[:1] * (longest - len(row)) for row in rows])


def _iota(text: str) -> np.ndarray:
    """Read `[4,16]T(1,0)`: numbers counted up in an array whose axes are then permuted."""
    shape, _, permutation = text.partition("T(")
    shape = _numbers(shape)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    permutation = _numbers(permutation.partition(")")[0])
    return numbers.transpose(permutation) if permutation else numbers


def _named(text: str) -> np.ndarray:
    """Read `mesh['a'=4,'b'=16], device_ids=([4,16]T(1,0)) {'b'}`: groups along axes of a mesh.

    An axis may be given in part, as `'b':(2)4`: 4 of its indices, behind a factor of 2.
    """
    axes = {name: int(n) for name, n in re.findall(r"'([^']*)'=(\d+)", text)}
    order = re.search(r"device_ids=\((.*?)\) ?\{", text)
    wanted = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", text[text.rindex("{") :])
    parts = {name: (int(before), int(n)) for name, before, n in wanted if n}
    shape, moved = [], []
    for name, size in axes.items():
        before, part = parts.get(name, (1, size))
        if any(name == x for x, _, _ in wanted):
            moved.append(len(shape) + 1)
        shape += [before, part, size // before // part]
    ids = np.arange(math.prod(shape)) if order is None else _iota(order[1])
    grid = ids.reshape(shape)
    kept = [axis for axis in range(grid.ndim) if axis not in moved]
    members = math.prod(grid.shape[axis] for axis in moved)
    return grid.transpose(kept + moved).reshape(-1, members)
