"""What the devices of a compiled program send to each other."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dsv4_jax.hlo.groups import groups_of
from dsv4_jax.hlo.loops import runs
from dsv4_jax.hlo.text import Computation, Instruction, Program

ALL_TO_ALL = ("all-to-all", "ragged-all-to-all")
# Bytes that a device sends, of `size` bytes of operands, in a group of n.
SENT = {
    "all-gather": lambda n, size: (n - 1) * size,
    "all-reduce": lambda n, size: 2 * (n - 1) / n * size,
    "reduce-scatter": lambda n, size: (n - 1) / n * size,
    "all-to-all": lambda n, size: (n - 1) / n * size,
    "ragged-all-to-all": lambda n, size: size,
    "collective-permute": lambda n, size: size,
    "collective-broadcast": lambda n, size: size,
    "send": lambda n, size: size,
}
_TARGET = re.compile(r'custom_call_target="AsyncCollective(Start|Done)"')
_CHAIN = re.compile(r'\bchain_id="(\d+)"')
_TRANSFER = re.compile(r'\b_xla_megascale_transfer_type="(\w+)"')
_RENDEZVOUS = re.compile(r'\b_xla_host_transfer_rendezvous="([^"]*)"')
_SLICES = re.compile(r'\b_xla_megascale_target="\{([\d,]*)\}')


class Collective(NamedTuple):
    """An exchange of data between devices."""

    kind: str  # a key of SENT
    name: str  # of the instruction that begins it
    computation: str  # where that is
    op_name: str  # the path of `jax.named_scope`s that it comes from; some have a neighbour's
    done: str | None  # the instruction that waits for it; None if the first does
    times: float  # that it runs when the program does
    group: int  # devices that exchange data with each other
    crosses: bool  # whether any group has devices of several slices
    sent: float  # bytes that a device sends each time
    slow: float  # of these, those to other slices

    @property
    def is_async(self) -> bool:
        """Whether the device computes something else until it waits for the exchange."""
        return self.done is not None

    @property
    def bytes(self) -> float:
        """What a device sends when the program runs once."""
        return self.sent * self.times


class _Found(NamedTuple):
    """A collective, and where it begins and ends in the schedule around it."""

    kind: str
    collective: Instruction
    inside: Computation  # that has the collective
    start: Instruction
    done: Instruction | None


def collectives(program: Program, devices_per_slice: int) -> list[Collective]:
    """Return the exchanges of a program, each once.

    Bytes are those of rings: of the whole array a device sends the share (n - 1) / n to gather or
    to reduce-scatter it, twice that to all-reduce it, and of its operand that share in an
    all-to-all and all of it in a permutation. A ragged all-to-all counts with the smaller of its
    operand and its output: what it may send at most, as sizes are known only when it runs. Where
    groups have devices of several slices, the data crosses between slices once for each pair of
    slices, not once for each pair of devices, as libtpu and NCCL arrange it: the share (s - 1) /
    (n - 1) of what is sent, for groups in s slices; of an all-to-all what is for other slices. What
    libtpu itself has split into an exchange between slices by the host and one inside of each is
    two collectives.

    Args:
      devices_per_slice: devices with consecutive numbers in the program are in a slice together.
    """
    times = runs(program)
    return [
        _collective(program, computation, found, times[computation.name], devices_per_slice)
        for computation in scheduled(program, times)
        for found in _find(program, computation)
    ]


def scheduled(program: Program, times: dict[str, float]) -> list[Computation]:
    """Return the computations that run whose instructions are begun one by one: no fusions."""
    names = {program.entry}
    for computation in reversed(program.computations.values()):
        if computation.name in names:
            for x in computation.instructions:
                if x.opcode in ("while", "conditional", "call"):
                    names.update(x.called.values())
    return [c for name, c in program.computations.items() if name in names and times[name]]


def begins(program: Program, x: Instruction) -> tuple[Instruction, Computation] | None:
    """Return the collective that an instruction wraps, with where it stands, if it does."""
    if x.opcode != "fusion" and not x.opcode.endswith("-start"):
        return None
    for inner in program.called_by(x):
        for y in inner.instructions:
            if y.opcode in SENT:
                return y, inner
            if y.opcode == "fusion" and (found := begins(program, y)):
                return found
    return None


def _find(program: Program, computation: Computation) -> Iterator[_Found]:
    for x in computation.instructions:
        base = x.opcode.removesuffix("-start")
        if x.opcode == "send":
            yield _sent_by_host(computation, x)
        elif base in SENT:
            done = _done(computation, x) if base != x.opcode else None
            yield _Found(base, x, computation, x, done)
        elif wrapped := begins(program, x):
            if x.opcode == "fusion":
                yield from _fused(program, computation, x, *wrapped)
            else:
                collective, inside = wrapped
                yield _Found(collective.opcode, collective, inside, x, _done(computation, x))


def _done(computation: Computation, start: Instruction) -> Instruction | None:
    """Return what waits for `X-start`, through any `X-update`; XLA makes some not wait longer."""
    if '"is_sync":true' in start.rest:
        return None
    base = start.opcode.removesuffix("-start")
    for x in computation.users[start.name]:
        if x.opcode == f"{base}-done":
            return x
        if x.opcode == f"{base}-update":
            return _done(computation, x._replace(opcode=start.opcode))
    return None


def _fused(
    program: Program,
    computation: Computation,
    fusion: Instruction,
    collective: Instruction,
    inside: Computation,
) -> Iterator[_Found]:
    """Yield a collective in a fusion of the TPU compiler, unless it has begun before.

    An "async collective fusion" is a chain: a fusion that begins, some that compute and go on with
    the exchange, and one that waits. Each of them has the collective. A fusion with an all-reduce
    of which it keeps a part is a reduce-scatter.
    """
    part = chain_part(program, fusion)
    if part is None:
        size = sum(x.bytes for x in collective.arrays)
        is_part = collective.opcode == "all-reduce" and sum(x.bytes for x in fusion.arrays) < size
        kind = "reduce-scatter" if is_part else collective.opcode
        yield _Found(kind, collective, inside, fusion, None)
    elif part == "Start":
        chain, begun = _CHAIN.findall(collective.rest), False
        for x in computation.instructions:
            begun = begun or x is fusion
            if begun and x.opcode == "fusion" and chain_part(program, x) == "Done":
                other, _ = begins(program, x)
                if _CHAIN.findall(other.rest) == chain:
                    yield _Found(collective.opcode, collective, inside, fusion, x)
                    return
        yield _Found(collective.opcode, collective, inside, fusion, None)


def chain_part(program: Program, fusion: Instruction) -> str | None:
    """Return "Start", "Done" or "" for a fusion of an async collective fusion, else None."""
    wrapped = begins(program, fusion)
    if wrapped is None:
        return None
    collective, _ = wrapped
    for inner in program.called_by(fusion):
        for x in inner.instructions:
            if x.opcode == "custom-call" and (target := _TARGET.search(x.rest)):
                return target[1]
    return "" if _CHAIN.search(collective.rest) else None


def _sent_by_host(computation: Computation, send: Instruction) -> _Found:
    """Return an exchange between slices that the hosts do: of what is sent, until it is received.

    It is a `send` and a `recv` with the same rendezvous.
    """
    transfer, meeting = _TRANSFER.search(send.rest), _RENDEZVOUS.search(send.rest)
    kind = transfer[1].lower().replace("_", "-") if transfer else "send"
    done = next((x for x in computation.users[send.name] if x.opcode == "send-done"), None)
    for x in computation.instructions if meeting else ():
        if x.opcode == "recv" and meeting[0] in x.rest:
            waits = (y for y in computation.users[x.name] if y.opcode == "recv-done")
            done = next(waits, done)
    return _Found(kind if kind in SENT else "send", send, computation, send, done)


def _collective(
    program: Program, computation: Computation, found: _Found, times: float, per_slice: int
) -> Collective:
    operands = [x.arrays for x in found.inside.operands(found.collective)]
    sizes = [sum(array.bytes for array in arrays) for arrays in operands]
    if found.kind == "ragged-all-to-all":
        size = min(sizes[:2])
    else:
        size = sum(sizes)
    group, slices = _group(program, found, per_slice)
    sent = SENT[found.kind](group, size)
    return Collective(
        kind=found.kind,
        name=found.start.name,
        computation=computation.name,
        op_name=_op_name(computation, found),
        done=found.done.name if found.done else None,
        times=times,
        group=group,
        crosses=slices > 1,
        sent=sent,
        slow=sent * _slow_share(found.kind, group, slices),
    )


def _op_name(computation: Computation, found: _Found) -> str:
    """Return where a collective comes from; if it has lost that, where what reads it comes from."""
    end = found.done or found.start
    readers = computation.users[end.name]
    named = (found.collective, found.start, end, *readers, *computation.operands(found.start))
    return next((x.op_name for x in named if x.op_name), "")


def _group(program: Program, found: _Found, per_slice: int) -> tuple[int, int]:
    """Return the number of devices of a group, and in how many slices they are."""
    if found.start.opcode == "send":
        slices = _SLICES.search(found.start.rest)
        number = len(slices[1].split(",")) if slices else 2
        return number, number
    groups = groups_of(program, found.collective)
    return groups.shape[1], _slices(groups.tobytes(), groups.shape, per_slice)


@functools.lru_cache(maxsize=2**12)
def _slices(groups: bytes, shape: tuple[int, int], per_slice: int) -> int:
    """Return in how many slices the devices of a group are at most."""
    slices = np.sort(np.frombuffer(groups, int).reshape(shape) // per_slice, axis=1)
    return 1 + int((np.diff(slices, axis=1) > 0).sum(axis=1).max(initial=0))


def _slow_share(kind: str, group: int, slices: int) -> float:
    """Return which share of what a device sends crosses between slices."""
    if slices == 1:
        return 0.0
    if kind in ALL_TO_ALL:
        return (group - group / slices) / (group - 1)
    if kind in ("all-gather", "all-reduce", "reduce-scatter"):
        return (slices - 1) / (group - 1)
    return 1.0
