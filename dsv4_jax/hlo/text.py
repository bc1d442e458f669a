"""Compiled programs, read: computations, instructions and shapes.

The text is that of `compiled.as_text()`: XLA's optimised HLO. Computations come before those that
call them, and the instructions of each are in the order in which a device begins them.
"""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

_NAME = r"[\w.\-]+"
_HEADER = re.compile(rf"(ENTRY )?%({_NAME}) \(.*\{{$")
_RESULT = re.compile(rf"\s+(ROOT )?%({_NAME}) = ")
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_OPERAND = re.compile(rf"%({_NAME})")
_ARRAY = re.compile(r"([a-z]\w*)\[([0-9,<= ]*)\](?:\{[^}S]*(?:S\((\d+)\))?[^}]*\})?")
_CALLED = re.compile(
    rf"\b(calls|to_apply|body|condition|true_computation|false_computation)=%({_NAME})"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_OP_NAME = re.compile(r'\bmetadata=\{[^}]*?op_name="([^"]*)"')
# Names that are numbers of bits but for these.
_BITS = {"pred": 8, "token": 0, "opaque": 0}


class Array(NamedTuple):
    """The shape of an array of a program."""

    dtype: str
    shape: tuple[int, ...]
    space: int  # 0 is HBM; on TPU 1 is the vector memory of the chip, others are for scalars

    @property
    def size(self) -> int:
        """The number of elements; of a bound dimension, the most."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        """Bytes of the elements, without what a layout pads."""
        return self.size * _bits(self.dtype) / 8


class Instruction(NamedTuple):
    """A line of a program."""

    name: str
    result: str  # the type of what it returns, as text
    opcode: str
    operands: tuple[str, ...]  # names of instructions of the same computation
    rest: str  # attributes, as text; of parameters and constants, first the value
    is_root: bool

    @property
    def arrays(self) -> tuple[Array, ...]:
        """What it returns; tuples of tuples are flat."""
        return arrays_of(self.result)

    @property
    def value(self) -> str:
        """What stands between the parentheses of a parameter or constant."""
        return self.rest.partition(")")[0]

    def attribute(self, name: str) -> str:
        """Return an attribute up to the next comma or brace, or an empty string."""
        found = re.search(rf"\b{name}=\{{?([^,}}]*)", self.rest)
        return found[1] if found else ""

    def numbers(self, name: str) -> tuple[int, ...]:
        """Return an attribute that is a list of numbers, `name={1,2}`."""
        found = re.search(rf"\b{name}=\{{([0-9,]*)\}}", self.rest)
        return tuple(map(int, found[1].split(","))) if found and found[1] else ()

    @property
    def called(self) -> dict[str, str]:
        """Names of the computations that it calls, by the attribute or the number of the branch."""
        names = dict(_CALLED.findall(self.rest))
        branches = _BRANCHES.search(self.rest)
        if branches:
            names |= {str(i): x for i, x in enumerate(_OPERAND.findall(branches[1]))}
        return names

    @property
    def op_name(self) -> str:
        """The path of `jax.named_scope`s and functions that it comes from."""
        found = _OP_NAME.search(self.rest)
        return found[1] if found else ""


class Computation:
    """A list of instructions, in the order in which they begin."""

    def __init__(self, name: str, instructions: list[Instruction]):
        self.name, self.instructions = name, instructions

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """The instructions by their names."""
        return {x.name: x for x in self.instructions}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read what another returns, by the name of that."""
        users = {x.name: [] for x in self.instructions}
        for x in self.instructions:
            for operand in dict.fromkeys(x.operands):
                users[operand].append(x)
        return users

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """The parameters by their numbers."""
        return {int(x.value): x for x in self.instructions if x.opcode == "parameter"}

    @property
    def root(self) -> Instruction:
        """What the computation returns."""
        return next(x for x in reversed(self.instructions) if x.is_root)

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """Return the instructions whose results another reads."""
        return [self.by_name[name] for name in instruction.operands]


class Program(NamedTuple):
    """A compiled program of one device of many."""

    computations: dict[str, Computation]  # each before those that call it
    entry: str  # the name of the one that runs
    devices: int  # with several slices of TPUs, those of one: hosts send to the others

    def called_by(self, instruction: Instruction) -> list[Computation]:
        """Return the computations that an instruction calls."""
        return [self.computations[name] for name in instruction.called.values()]


def parse_program(text: str) -> Program:
    """Read a compiled program.

    Raises:
      ValueError: the text is not that of a compiled program, whose instructions have an order.
    """
    header, _, body = text.partition("\n")
    if not header.startswith("HloModule ") or "is_scheduled=true" not in header:
        raise ValueError(
            f"expected the text of a compiled program, `HloModule ..., is_scheduled=true`, got "
            f"{header[:80]!r}; give compiled.as_text()"
        )
    counts = re.findall(r"\b(?:replica_count|num_partitions)=(\d+)", header)
    computations, entry, instructions = {}, "", []
    for line in body.split("\n"):
        if line.startswith("  "):
            instruction = _instruction(line)
            if instruction:
                instructions.append(instruction)
        elif found := _HEADER.match(line):
            instructions = []
            computations[found[2]] = Computation(found[2], instructions)
            entry = found[2] if found[1] else entry
    return Program(computations, entry, math.prod(map(int, counts)))


def _instruction(line: str) -> Instruction | None:
    start = _RESULT.match(line)
    opcode = _OPCODE.search(line, start.end() - 1) if start else None
    if opcode is None:
        return None
    result = line[start.end() : opcode.start()]
    begin, kind = opcode.end(), opcode[1]
    if kind in ("parameter", "constant"):
        return Instruction(start[2], result, kind, (), line[begin:], bool(start[1]))
    end = _closing(line, begin)
    operands = tuple(_OPERAND.findall(line, begin, end))
    return Instruction(start[2], result, kind, operands, line[end + 1 :], bool(start[1]))


def _closing(line: str, begin: int) -> int:
    """Return where the parenthesis closes that opens before `begin`."""
    end = line.index(")", begin)
    opened = line.count("(", begin, end)
    while opened:  # types of operands have some
        after = end + 1
        end = line.index(")", after)
        opened += line.count("(", after, end) - 1
    return end


@functools.lru_cache(maxsize=2**16)
def arrays_of(result: str) -> tuple[Array, ...]:
    """Read the type of a result."""
    return tuple(
        Array(dtype, tuple(int(n.strip(" <=")) for n in shape.split(",") if n), int(space or 0))
        for dtype, shape, space in _ARRAY.findall(result)
    )


@functools.cache
def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    return int(re.search(r"\d+", dtype)[0])  # of f8e4m3fn, the 8
