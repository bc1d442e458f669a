"""How much of what a compiled program sends is hidden behind what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from dsv4_jax.devices import Chip
from dsv4_jax.hlo.collectives import Collective, collectives, scheduled
from dsv4_jax.hlo.cost import Costs
from dsv4_jax.hlo.loops import assumed_trips, runs
from dsv4_jax.hlo.text import Computation, Instruction, Program


class Overlap(NamedTuple):
    """Seconds of a device in one run of the program."""

    seconds: float  # of sending
    hidden: float  # of these, those in which it computes, too

    @property
    def hidden_share(self) -> float:
        """The share of the sending that takes no time of its own; 1 where nothing is sent."""
        return self.hidden / self.seconds if self.seconds else 1.0


class Timed(NamedTuple):
    """A collective with what it takes in one run of the program."""

    collective: Collective
    seconds: float
    hidden: float  # of these, those in which the device computes, too


Rare = Callable[[str], bool]  # of an `op_name`


def _nothing(op_name: str) -> bool:
    return False


def timed_collectives(
    program: Program, chip: Chip, devices_per_slice: int, rare: Rare = _nothing
) -> list[Timed]:
    """Return how long each collective takes, and how much of that is hidden.

    A collective takes the bytes that a device sends over the speed of the network. It can hide
    behind what the schedule has between its beginning and its end, loops included, each instruction
    with the time of a roofline. Of several collectives at once each second of computation hides one
    second of one of them: of that which is waited for first. What computation hides in a loop it
    does not hide around the loop. A synchronous collective hides nothing.

    Args:
      rare: says of what a program seldom does: of conditionals that come from there the shortest
        branch counts, of others the longest, and the collectives there are left out.
    """
    found = [x for x in collectives(program, devices_per_slice) if not rare(x.op_name)]
    return _Schedule(program, chip, found, rare).results()


def overlap(
    program: Program,
    chip: Chip,
    *,
    devices_per_slice: int,
    chosen: Callable[[Collective], bool] = lambda collective: True,
    rare: Rare = _nothing,
) -> dict[str, Overlap]:
    """Return for each kind of collective how long it takes, and how much of that is hidden.

    Args:
      chosen: says which collectives to report; the others hide behind the computation all the same.
      rare: as in `timed_collectives`.
    """
    totals: dict[str, Overlap] = {}
    for collective, seconds, hidden in timed_collectives(program, chip, devices_per_slice, rare):
        if chosen(collective):
            before = totals.get(collective.kind, Overlap(0.0, 0.0))
            totals[collective.kind] = Overlap(before.seconds + seconds, before.hidden + hidden)
    return totals


def total(overlaps: Iterable[Overlap]) -> Overlap:
    """Return the sum of what several kinds of collectives take and hide."""
    overlaps = list(overlaps)
    return Overlap(sum(x.seconds for x in overlaps), sum(x.hidden for x in overlaps))


def compute_seconds(program: Program, chip: Chip, rare: Rare = _nothing) -> float:
    """Return how long a program computes at least, by a roofline of each instruction.

    Args:
      rare: as in `timed_collectives`.
    """
    return _Schedule(program, chip, [], rare).compute(program.computations[program.entry])


def network_seconds(collective: Collective, chip: Chip) -> float:
    """Return how long a collective takes at least, each time."""
    fast = collective.sent - collective.slow
    return fast / chip.fast_network + collective.slow / chip.slow_network


class _Schedule:
    """A program run instruction by instruction, in the order of its text."""

    def __init__(self, program: Program, chip: Chip, found: Iterable[Collective], rare: Rare):
        self._program, self._chip, self._costs = program, chip, Costs(program, chip)
        self._rare = rare
        self._found: dict[str, list[Collective]] = {}
        for collective in found:
            self._found.setdefault(collective.computation, []).append(collective)
        self._compute: dict[str, float] = {}
        self._hidden: dict[tuple[str, str], float] = {}  # by computation and collective

    def results(self) -> list[Timed]:
        """Return what the collectives take and hide."""
        for computation in scheduled(self._program, runs(self._program)):
            self._hide(computation)
        return [
            Timed(
                collective,
                network_seconds(collective, self._chip) * collective.times,
                self._hidden.get((name, collective.name), 0.0) * collective.times,
            )
            for name, found in self._found.items()
            for collective in found
        ]

    def compute(self, computation: Computation) -> float:
        """Return the seconds that a computation computes each time, whatever it hides."""
        if computation.name not in self._compute:
            self._compute[computation.name] = sum(
                self._seconds(computation, x, self.compute) for x in computation.instructions
            )
        return self._compute[computation.name]

    def _seconds(
        self, computation: Computation, x: Instruction, inside: Callable[[Computation], float]
    ) -> float:
        """Return the seconds of an instruction, given those of computations."""
        if x.opcode == "while":
            trips = assumed_trips(self._program, computation, x)
            return trips * sum(map(inside, self._program.called_by(x)))
        if x.opcode == "conditional":
            pick = min if self._rare(x.op_name) else max
            return pick(map(inside, self._program.called_by(x)))
        if x.opcode == "call":
            return sum(map(inside, self._program.called_by(x)))
        return self._costs.seconds(computation, x)

    def _free(self, computation: Computation) -> float:
        """Return the seconds in which a computation computes and hides nothing of its own."""
        found = self._found.get(computation.name, ())
        hidden = sum(self._hidden.get((computation.name, x.name), 0.0) for x in found)
        inner = sum(self._seconds(computation, x, self._free) for x in computation.instructions)
        return inner - hidden

    def _hide(self, computation: Computation) -> None:
        """Share out what a computation computes to the collectives that it has begun.

        Computations that it calls come before.
        """
        found = [x for x in self._found.get(computation.name, ()) if x.is_async]
        if not found:
            return
        places = {x.name: i for i, x in enumerate(computation.instructions)}
        found.sort(key=lambda collective: places[collective.done])
        left = {x.name: network_seconds(x, self._chip) for x in found}
        for place, x in enumerate(computation.instructions):
            waiting = [c for c in found if places[c.name] < place < places[c.done] and left[c.name]]
            seconds = self._seconds(computation, x, self._free) if waiting else 0.0
            for collective in waiting:
                hidden = min(seconds, left[collective.name])
                seconds -= hidden
                left[collective.name] -= hidden
                key = computation.name, collective.name
                self._hidden[key] = self._hidden.get(key, 0.0) + hidden
