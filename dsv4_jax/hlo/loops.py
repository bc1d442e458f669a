"""How often the parts of a compiled program run: loops and what they call."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from dsv4_jax.hlo.text import Computation, Instruction, Program

_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# Opcodes of what returns the number that it is given.
_MOVES = {"copy", "bitcast", "reshape", "convert", "copy-start", "copy-done"}


def runs(program: Program) -> dict[str, float]:
    """Return how often each computation runs when the program does.

    Loops of which nothing is known count once, and so does each branch of a conditional.
    """
    times = dict.fromkeys(program.computations, 0.0)
    times[program.entry] = 1.0
    for computation in reversed(program.computations.values()):
        if times[computation.name]:
            for name, factor in _calls(program, computation):
                times[name] += times[computation.name] * factor
    return times


def _calls(program: Program, computation: Computation) -> Iterator[tuple[str, int]]:
    for instruction in computation.instructions:
        is_loop = instruction.opcode == "while"
        times = assumed_trips(program, computation, instruction) if is_loop else 1
        for name in instruction.called.values():
            yield name, times


def unknown_loops(program: Program) -> list[str]:
    """Return the names of loops of which it cannot be told how often their bodies run."""
    return [
        instruction.name
        for computation in program.computations.values()
        for instruction in computation.instructions
        if instruction.opcode == "while"
        and trip_count(program, computation, instruction) is None
    ]


def assumed_trips(program: Program, computation: Computation, loop: Instruction) -> int:
    """Return how often the body of a `while` runs; once, if that cannot be told."""
    trips = trip_count(program, computation, loop)
    return 1 if trips is None else trips


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """Return how often the body of a `while` runs, if that can be told.

    It can if the compiler says it, or if the condition compares a counter with a constant.
    """
    known = _TRIP_COUNT.search(loop.rest)
    return int(known[1]) if known else _Loop(program, computation, loop).trips()


class _Loop:
    """A `while` with a counter that grows by a constant until it is not below another."""

    def __init__(self, program: Program, computation: Computation, loop: Instruction):
        called = loop.called
        self._program, self._outer = program, computation
        self._body = program.computations[called["body"]]
        self._condition = program.computations[called["condition"]]
        self._initial = computation.by_name[loop.operands[0]]

    def trips(self) -> int | None:
        """Return how often the body runs, if the condition is `counter < bound` or alike."""
        direction, compared = self._comparison()
        bounds = [self._bound(x) for x in compared]
        for x, bound in zip(compared, reversed(bounds), strict=True):
            index = _element(self._condition, x)
            step = None if index is None or bound is None else self._step(index)
            if step:
                last = direction in ("LE", "GE")  # the bound itself counts, too
                steps = (bound - self._start(index)) / step
                return max(0, math.floor(steps) + 1 if last else math.ceil(steps))
        return None

    def _comparison(self) -> tuple[str, list[Instruction]]:
        """Return the direction in which the condition compares, and what: not inside a fusion."""
        outer = self._condition
        root = _origin(outer, outer.root)
        inner = self._program.called_by(root)[0] if root.opcode == "fusion" else outer
        compare = _origin(inner, inner.root)
        if compare.opcode != "compare" or compare.attribute("direction") == "EQ":
            return "", []
        compared = [_origin(inner, x) for x in inner.operands(compare)]
        if inner is not outer:
            compared = [_outside(outer, root, x) for x in compared]
        return compare.attribute("direction"), compared

    def _bound(self, instruction: Instruction) -> int | None:
        """Return a constant of the condition, or one that the loop hands on unchanged."""
        if instruction.opcode == "constant":
            return _integer(instruction)
        index = _element(self._condition, instruction)
        return self._constant(index) if index is not None and self._step(index) == 0 else None

    def _start(self, index: int) -> int:
        """Return where a counter starts; 0 where that cannot be told, as loops of JAX do."""
        return self._constant(index) or 0

    def _constant(self, index: int) -> int | None:
        """Return what an element of the loop's tuple is at first, if it is a constant."""
        if self._initial.opcode != "tuple":
            return None
        return _integer(_origin(self._outer, self._outer.operands(self._initial)[index]))

    def _step(self, index: int) -> int | None:
        """Return by what an element of the loop's tuple grows each time, if by a constant."""
        body = self._body
        if body.root.opcode != "tuple":
            return None
        x, step = _origin(body, body.operands(body.root)[index]), 0
        while (added := self._increment(x)) is not None:
            x, step = _origin(body, added[0]), step + added[1]
        return step if _element(body, x) == index else None

    def _increment(self, x: Instruction) -> tuple[Instruction, int] | None:
        """Return to what an instruction of the body adds a constant, and that constant."""
        if x.opcode != "fusion":
            return _increment(self._body, x)
        inner = self._program.called_by(x)[0]
        added = _increment(inner, _origin(inner, inner.root))
        if added is None or added[0].opcode != "parameter":
            return None
        return _outside(self._body, x, added[0]), added[1]


def _origin(computation: Computation, instruction: Instruction) -> Instruction:
    """Return what makes a number that an instruction may only move."""
    while instruction.opcode in _MOVES:
        instruction = computation.operands(instruction)[0]
    return instruction


def _outside(computation: Computation, fusion: Instruction, inner: Instruction) -> Instruction:
    """Return what a parameter of a fusion is in the computation around it."""
    if inner.opcode != "parameter":
        return inner
    return _origin(computation, computation.operands(fusion)[int(inner.value)])


def _element(computation: Computation, instruction: Instruction) -> int | None:
    """Return which element of the parameter of a loop's computation an instruction is, if any."""
    if instruction.opcode != "get-tuple-element":
        return None
    is_parameter = computation.operands(instruction)[0].opcode == "parameter"
    return int(instruction.attribute("index")) if is_parameter else None


def _increment(computation: Computation, x: Instruction) -> tuple[Instruction, int] | None:
    """Return to what an instruction adds a constant, and that constant."""
    if x.opcode not in ("add", "subtract"):
        return None
    left, right = (_origin(computation, operand) for operand in computation.operands(x))
    sign = 1 if x.opcode == "add" else -1
    if sign == 1 and left.opcode == "constant":
        left, right = right, left
    by = _integer(right)
    return None if by is None else (left, sign * by)


def _integer(instruction: Instruction) -> int | None:
    """Return the number that an instruction is, if it is a whole one."""
    if instruction.opcode != "constant" or not re.fullmatch(r"-?\d+", instruction.value):
        return None
    return int(instruction.value)
