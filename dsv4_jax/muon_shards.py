"""Orthogonalise matrices whose parts lie on several devices: each matrix once, on one of them.

What lies whole on a device, as experts do, stays there. The parts of other matrices travel to the
device that a matrix is assigned to, where all of them are worked on, and the result travels back.
Of a stack of at least as many matrices as devices have parts of it each device takes one at a time,
turn by turn. What is left is assigned so that the work is balanced; one exchange carries all of it
there, one carries it back.

Source: report 3, where dense matrices are assigned to ranks by a knapsack; fact sheet 7.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsv4_jax.newton_schulz import HYBRID_STEPS, as_matrices
from dsv4_jax.params import BATCH, IN
from dsv4_jax.shapes import Array, Float
from dsv4_jax.sharding import AxisSplit, parts_of, spec_of

# From a stack of matrices to as many of the same shape.
Direction = Callable[[Array], Array]


class Form(NamedTuple):
    """What the parts of a matrix look like: axes of a part, and the mesh axes that split each."""

    shape: tuple[int, ...]
    split: tuple[tuple[str, ...], ...]
    rows: int  # of the axes, those that are merged to rows

    @property
    def size(self) -> int:
        """Elements of a part."""
        return math.prod(self.shape)

    def matrix(self, mesh: Mesh) -> tuple[int, int]:
        """Return the rows and columns of the whole."""
        parts = zip(self.shape, self.split, strict=True)
        whole = [n * parts_of(names, mesh) for n, names in parts]
        return math.prod(whole[: self.rows]), math.prod(whole[self.rows :])


def directions(
    leaves: Sequence[Array], kinds: Sequence[tuple[str, ...]],
    splits: Sequence[tuple[AxisSplit, ...]], mesh: Mesh, direction: Direction,
) -> tuple[Array, ...]:
    """Apply `direction` to every matrix of weights that lie split on a mesh.

    Args:
      kinds: of each leaf's axes: "batch" ones enumerate matrices of "in" and "out" axes.
      splits: how each leaf's axes are split.
    """
    specs = tuple(map(spec_of, splits))

    def on_device(*parts: Array) -> tuple[Array, ...]:
        found: list = [None] * len(parts)
        for group, members in _by_group(kinds, splits, mesh).items():
            if not group:
                for i in members:
                    whole = direction(as_matrices(parts[i], kinds[i]))
                    found[i] = whole.reshape(parts[i].shape)
                continue
            forms = [_form(parts[i].shape, kinds[i], splits[i]) for i in members]
            stacks = [parts[i].reshape(-1, forms[k].size) for k, i in enumerate(members)]
            results = _of_group(stacks, forms, _Group.of(group, mesh), mesh, direction)
            for i, stack in zip(members, results, strict=True):
                found[i] = stack.reshape(parts[i].shape)
        return tuple(found)

    sharded = jax.shard_map(
        on_device, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False
    )
    return sharded(*leaves)


def _by_group(
    kinds: Sequence[tuple[str, ...]], splits: Sequence[tuple[AxisSplit, ...]], mesh: Mesh
) -> dict[tuple[str, ...], list[int]]:
    """Return the leaves by the mesh axes whose devices have, or could have, parts of a matrix.

    Devices along the others hold other matrices.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, (leaf_kinds, split) in enumerate(zip(kinds, splits, strict=True)):
        stacked = zip(leaf_kinds, split, strict=True)
        others = {name for kind, part in stacked if kind == BATCH for name in part.names}
        group = tuple(
            name for name in mesh.axis_names if name not in others and mesh.shape[name] > 1
        )
        groups.setdefault(group, []).append(i)
    return groups


def _form(shape: tuple[int, ...], kinds: tuple[str, ...], split: tuple[AxisSplit, ...]) -> Form:
    first = kinds.count(BATCH)
    return Form(shape[first:], tuple(part.names for part in split[first:]), kinds.count(IN))


class _Group(NamedTuple):
    """The devices along some mesh axes."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, names: tuple[str, ...], mesh: Mesh) -> _Group:
        return cls(names, tuple(mesh.shape[name] for name in names))

    @property
    def ranks(self) -> int:
        return math.prod(self.sizes)

    def exchange(self, rows: Float[Array, "ranks size"]) -> Float[Array, "ranks size"]:
        """Send each row to one device; return what comes, in the order of senders."""
        return jax.lax.all_to_all(rows, self.names, split_axis=0, concat_axis=0, tiled=True)


def _of_group(
    stacks: Sequence[Float[Array, "count size"]], forms: Sequence[Form], group: _Group,
    mesh: Mesh, direction: Direction,
) -> list[Array]:
    """Return the directions of parts of matrices, each whole on the devices of a group together."""
    in_turn = [len(stack) // group.ranks * group.ranks for stack in stacks]
    rest = [stack[count:] for stack, count in zip(stacks, in_turn, strict=True)]
    rest = _assigned(rest, forms, group, mesh, direction)
    out = []
    for stack, form, count, left in zip(stacks, forms, in_turn, rest, strict=True):
        found = _by_turns(stack[:count], form, group, direction) if count else stack[:0]
        out.append(jnp.concatenate([found, left]))
    return out


def _by_turns(
    stack: Float[Array, "count size"], form: Form, group: _Group, direction: Direction
) -> Float[Array, "count size"]:
    """Return the directions of as many matrices for each device of the group, one at a time."""

    def turn(parts: Float[Array, "ranks size"]) -> Float[Array, "ranks size"]:
        return group.exchange(_work_on(group.exchange(parts), form, group, direction))

    return jax.lax.map(turn, stack.reshape(-1, group.ranks, form.size)).reshape(stack.shape)


def _work_on(
    parts: Float[Array, "ranks size"], form: Form, group: _Group, direction: Direction
) -> Float[Array, "ranks size"]:
    whole = direction(join_parts(parts, form, *group)[None])[0]
    return cut_parts(whole, form, *group)


def _assigned(
    stacks: Sequence[Float[Array, "count size"]], forms: Sequence[Form], group: _Group,
    mesh: Mesh, direction: Direction,
) -> list[Float[Array, "count size"]]:
    """Return the same of any number of matrices, by one exchange in each direction."""
    items = [(i, z) for i, stack in enumerate(stacks) for z in range(len(stack))]
    if not items:
        return list(stacks)
    costs = [newton_schulz_flops(*forms[i].matrix(mesh)) for i, _ in items]
    assigned = [[items[k] for k in own] for own in assign(costs, group.ranks)]
    sent = _pack([[stacks[i][z] for i, z in own] for own in assigned])
    worked = _work(group.exchange(sent), assigned, forms, group, direction)
    places = {
        item: (rank, at) for rank, own in enumerate(assigned)
        for item, at in zip(own, _starts([forms[i].size for i, _ in own]), strict=True)
    }
    back, out = group.exchange(worked), []
    for i, stack in enumerate(stacks):
        found = [places[i, z] for z in range(len(stack))]
        parts = [back[rank, at : at + forms[i].size] for rank, at in found]
        out.append(jnp.stack(parts) if parts else stack)
    return out


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(sizes[:-1])] if sizes else []


def _pack(rows: Sequence[Sequence[Float[Array, " n"]]]) -> Float[Array, "ranks size"]:
    """Put what each rank gets into a row of its own, all as long as the longest."""
    size = max(sum(x.size for x in row) for row in rows)
    joined = [jnp.concatenate(row) for row in rows if row]  # the idle ranks are the last ones
    packed = jnp.stack([jnp.pad(row, (0, size - row.size)) for row in joined])
    return jnp.pad(packed, ((0, len(rows) - len(packed)), (0, 0)))


def _work(
    received: Float[Array, "ranks size"], assigned: Sequence[Sequence[tuple[int, int]]],
    forms: Sequence[Form], group: _Group, direction: Direction,
) -> Float[Array, "ranks size"]:
    """Replace the parts of this rank's matrices by those of their directions, one after another."""
    distinct = list(dict.fromkeys(forms))
    kind, start = np.zeros((2, len(assigned), max(map(len, assigned))), np.int32)
    for rank, own in enumerate(assigned):
        of_own = [forms[i] for i, _ in own]
        kind[rank, : len(own)] = [1 + distinct.index(form) for form in of_own]
        start[rank, : len(own)] = _starts([form.size for form in of_own])
    kind, start = (jnp.asarray(table)[jax.lax.axis_index(group.names)] for table in (kind, start))

    def replace(form: Form, x, at):
        parts = jax.lax.dynamic_slice_in_dim(x, at, form.size, axis=1)
        parts = _work_on(parts, form, group, direction)
        return jax.lax.dynamic_update_slice_in_dim(x, parts, at, axis=1)

    ways = [lambda x, at: x, *(partial(replace, form) for form in distinct)]
    return jax.lax.fori_loop(
        0, kind.size, lambda i, x: jax.lax.switch(kind[i], ways, x, start[i]), received
    )


def join_parts(
    parts: Float[Array, "ranks size"], form: Form, group: tuple[str, ...], sizes: tuple[int, ...]
) -> Float[Array, "rows columns"]:
    """Make a matrix of the parts on all devices of a group, which are in the order of its axes."""
    order, whole = _order(form, group)
    x = parts.reshape(*sizes, *form.shape)
    # Devices along an axis that splits nothing have the same.
    x = x[tuple(slice(None) if name in whole else 0 for name in group)]
    rows = math.prod(x.shape[axis] for axis in order[: _merged(form, form.rows)])
    return x.transpose(order).reshape(rows, -1)


def cut_parts(
    matrix: Float[Array, "rows columns"], form: Form, group: tuple[str, ...],
    sizes: tuple[int, ...],
) -> Float[Array, "ranks size"]:
    """Undo `join_parts`."""
    order, whole = _order(form, group)
    size_of = dict(zip(group, sizes, strict=True))
    shape = (*(size_of[name] for name in whole), *form.shape)
    x = matrix.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))
    x = jnp.expand_dims(x, [i for i, name in enumerate(group) if name not in whole])
    return jnp.broadcast_to(x, (*sizes, *form.shape)).reshape(math.prod(sizes), form.size)


def _order(form: Form, group: tuple[str, ...]) -> tuple[list[int], list[str]]:
    """Return how axes of devices and of parts alternate in a matrix, and the devices' axes.

    These come first in the array that the order is of, then those of the parts.
    """
    splitting = {name for names in form.split for name in names}
    whole, order = [name for name in group if name in splitting], []
    for axis, names in enumerate(form.split):
        order += [*map(whole.index, names), len(whole) + axis]
    return order, whole


def _merged(form: Form, axes: int) -> int:
    """Return how many axes, of devices and parts, make up the first axes of the whole."""
    return sum(1 + len(names) for names in form.split[:axes])


def newton_schulz_flops(rows: int, columns: int) -> int:
    """Return the operations of orthogonalising a matrix, a multiply-add counting two."""
    small, large = sorted((rows, columns))
    steps = sum(times for _, times in HYBRID_STEPS)
    return steps * (4 * small**2 * large + 2 * small**3)


def assign(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Divide work among ranks, the dearest first and each to who has least.

    The largest load is then at most 4/3 of the least possible. Ranks without work are the last.

    Returns the indices of each rank's costs.
    """
    own: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = heapq.heappop(loads)
        own[rank].append(index)
        heapq.heappush(loads, (load + costs[index], rank))
    return own
