"""How long the instructions of a compiled program take at least, by a roofline.

An instruction takes as long as its matrix products at the device's peak, or as its traffic with the
memory of the device, whichever is longer. All products count with the peak of bfloat16. What else
is computed counts by its traffic alone.
"""

from __future__ import annotations

import functools
import json
import math
import re

from dsv4_jax.devices import Chip
from dsv4_jax.hlo.collectives import SENT, begins, chain_part
from dsv4_jax.hlo.text import Array, Computation, Instruction, Program

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "domain", "add-dependency", "recv", *SENT,
}
# Custom calls that tell the compiler something, or wait.
_FREE_CALLS = re.compile(
    r'custom_call_target="(AllocateBuffer|AssumeGatherIndicesInBound|GatherScatterIndicesBitpacked'
    r'|PrepareAsyncCall\w+|AsyncCollective\w+|ConcatBitcast)"'
)
_ESTIMATE = re.compile(r'"cost_estimate":(\{[^}]*\})')
_GEMM = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
_LABELS = re.compile(r"\bdim_labels=(\w+)_(\w+)->(\w+)")
_HOST = 5  # the space of arrays in the memory of the host
_PARTS = {"dynamic-slice", "slice", "gather"}


class Costs:
    """What the instructions of a program cost on a device."""

    def __init__(self, program: Program, chip: Chip):
        self._program, self._chip = program, chip
        self._flops = functools.cache(self._flops_of_fusion)  # a fusion may be called twice

    def seconds(self, computation: Computation, x: Instruction) -> float:
        """Return the time of one instruction; loops and calls have none of their own.

        Collectives have none either, nor what runs beside: on TPU what a SparseCore does.
        """
        if self._is_free(x):
            return 0.0
        estimate = _ESTIMATE.search(x.rest) if x.opcode == "custom-call" else None
        if estimate:
            told = json.loads(estimate[1])
            flops, traffic = float(told["flops"]), float(told["bytes_accessed"])
        else:
            flops, traffic = self.flops(computation, x), self.traffic(computation, x)
        return max(flops / self._chip.flops, traffic / self._chip.memory_speed)

    def _is_free(self, x: Instruction) -> bool:
        if x.opcode in ("copy-start", "slice-start"):  # from HBM to the chip, or back
            return False
        if x.opcode in _FREE or x.opcode.endswith(("-start", "-update", "-done")):
            return True
        if x.opcode == "custom-call":
            return _FREE_CALLS.search(x.rest) is not None
        return x.opcode == "fusion" and self._only_sends(x)

    def _only_sends(self, fusion: Instruction) -> bool:
        """Whether a fusion is a collective, and not one that computes beside it."""
        return begins(self._program, fusion) is not None and chain_part(self._program, fusion) != ""

    def flops(self, computation: Computation, x: Instruction) -> float:
        """Count the operations of the matrix products of an instruction."""
        if x.opcode == "fusion":
            return sum(self._flops(inner) for inner in self._program.called_by(x))
        if x.opcode == "dot":
            return _products(computation, x, x.numbers("lhs_contracting_dims"))
        if x.opcode == "convolution":
            return _convolution(computation, x)
        if x.opcode == "custom-call" and (found := _GEMM.search(x.rest)):
            axes = tuple(int(n.strip('"')) for n in found[1].split(",") if n)
            return _products(computation, x, axes)
        return 0.0

    def _flops_of_fusion(self, computation: Computation) -> float:
        return sum(self.flops(computation, x) for x in computation.instructions)

    def traffic(self, computation: Computation, x: Instruction) -> float:
        """Count the bytes that an instruction reads from the memory of the device and writes."""
        operands = computation.operands(x)
        if x.opcode == "fusion":
            (inner,) = self._program.called_by(x)
            read = sum(self._read(inner, inner.parameters[i]) for i in range(len(operands)))
            return read + self._written(inner, inner.root)
        if x.opcode in _PARTS:
            return 2 * self._bytes(x)
        if x.opcode == "dynamic-update-slice":
            return 2 * self._bytes(operands[1])
        if x.opcode == "scatter":
            return 2 * sum(map(self._bytes, operands[len(operands) // 2 + 1 :]))
        if x.opcode in ("copy-start", "slice-start"):
            moved = computation.users[x.name][0] if computation.users[x.name] else operands[0]
            size = sum(array.bytes for array in moved.arrays)
            ends = (*operands[0].arrays, *moved.arrays)
            return size * sum(map(self._in_memory, ends))
        return sum(map(self._bytes, operands)) + self._bytes(x)

    def _read(self, computation: Computation, x: Instruction) -> float:
        """Count the bytes that a fusion reads of a parameter, or of a view of it."""
        total, size = 0.0, self._bytes(x)
        for user in computation.users[x.name]:
            place = user.operands.index(x.name)
            if user.opcode in _PARTS and place == 0 and self._bytes(x):
                total += sum(array.bytes for array in user.arrays)
            elif user.opcode == "bitcast":
                total += self._read(computation, user)
            elif user.opcode == "fusion":
                (inner,) = self._program.called_by(user)
                total += self._read(inner, inner.parameters[place])
            elif not self._is_passed_on(user, place):
                return size
        return min(total, size)

    def _is_passed_on(self, user: Instruction, place: int) -> bool:
        """Whether an instruction of a fusion does not read an operand itself."""
        in_place = user.opcode in ("dynamic-update-slice", "scatter") and place == 0
        return in_place or user.opcode == "tuple" or self._is_free(user)

    def _written(self, computation: Computation, x: Instruction) -> float:
        """Count the bytes that a fusion writes of what its root, or a part of it, is."""
        operands = computation.operands(x)
        if x.opcode == "tuple":
            return sum(self._written(computation, operand) for operand in operands)
        if x.opcode in ("bitcast", "get-tuple-element"):
            return self._written(computation, operands[0])
        if x.opcode == "dynamic-update-slice":
            return self._bytes(operands[1]) if self._bytes(x) else 0.0
        if x.opcode == "fusion":
            (inner,) = self._program.called_by(x)
            return self._written(inner, inner.root)
        return 0.0 if self._is_free(x) else self._bytes(x)

    def _bytes(self, x: Instruction) -> float:
        return sum(array.bytes for array in x.arrays if self._in_memory(array))

    def _in_memory(self, array: Array) -> bool:
        """Whether an array is in the memory of the device, not on the chip or the host."""
        return array.space == 0 if self._chip.is_tpu else array.space != _HOST


def _products(computation: Computation, x: Instruction, axes: tuple[int, ...]) -> float:
    """Count the operations of a product of matrices, summed over axes of the left one."""
    left = computation.operands(x)[0].arrays[0].shape
    return 2.0 * x.arrays[0].size * math.prod(left[axis] for axis in axes)


def _convolution(computation: Computation, x: Instruction) -> float:
    """Count the operations of a convolution, which on TPU all matrix products are.

    Axes of a batch are axes of a window there, dilated so that each output meets one input.
    """
    left, right = (operand.arrays[0].shape for operand in computation.operands(x))
    inputs, kernels, outputs = _LABELS.search(x.rest).groups()
    shape = x.arrays[0].shape
    total = 2.0 * right[kernels.index("i")] * shape[outputs.index("b")] * shape[outputs.index("f")]
    for axis in (label for label in outputs if label.isdigit()):
        window = {
            name: _window(x.rest, name, int(axis), default)
            for name, default in (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
        }
        sizes = left[inputs.index(axis)], right[kernels.index(axis)], shape[outputs.index(axis)]
        total *= _meetings(*sizes, **window)
    return total


def _window(rest: str, name: str, axis: int, default: int) -> int:
    """Return a number of a window along an axis; of padding, that before the first."""
    window = re.search(r"\bwindow=\{([^}]*)\}", rest)
    found = re.search(rf"\b{name}=([-\dx_]+)", window[1]) if window else None
    return int(found[1].split("x")[axis].split("_")[0]) if found else default


@functools.lru_cache(maxsize=2**12)
def _meetings(
    inputs: int, kernel: int, outputs: int, *, stride: int, pad: int, lhs_dilate: int,
    rhs_dilate: int,
) -> int:
    """Count the pairs of an output and an element of the kernel that meet an input."""
    if (stride, pad, lhs_dilate) == (1, 0, 1) and inputs >= outputs + (kernel - 1) * rhs_dilate:
        return outputs * kernel
    length = (inputs - 1) * lhs_dilate + 1
    count = 0
    for k in range(kernel):
        first = k * rhs_dilate - pad
        places = range(first, first + outputs * stride, stride)
        count += sum(1 for p in places if 0 <= p < length and p % lhs_dilate == 0)
    return count
