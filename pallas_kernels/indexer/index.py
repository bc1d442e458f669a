"""Which entries a program of the indexer scores at a time, and where it keeps them."""

from __future__ import annotations

from typing import NamedTuple

from pallas_kernels.index_math import Index, Truth, cdiv, div, maximum, minimum, mod


class Programs(NamedTuple):
    """Queries of `rows` rows, shared by `count` programs: each takes every count-th."""

    rows: Index
    tokens: int
    count: int

    def length(self, program: Index) -> Index:
        """Return how many queries a program takes."""
        return cdiv(self.rows * self.tokens - program, self.count)

    def query(self, program: Index, n: Index) -> tuple[Index, Index]:
        """Return the row and the token of a program's n-th query."""
        number = program + n * self.count
        return div(number, self.tokens), mod(number, self.tokens)


class Rounds(NamedTuple):
    """Rounds of a query: the best so far and the next entries, side by side in `slots` places."""

    topk: int
    slots: int
    tile: int  # entries scored at once; divides what is left of the slots

    @property
    def new(self) -> int:
        """Return how many entries each round adds."""
        return self.slots - self.topk

    def count(self, first: Index, end: Index) -> Index:
        """Return how many rounds see all entries of a range."""
        return cdiv(maximum(end - first, 0), self.new)

    def tiles(self, first: Index, end: Index, round_: Index) -> Index:
        """Return how many tiles of a round have entries of the range."""
        left = end - first - round_ * self.new
        return cdiv(maximum(minimum(left, self.new), 0), self.tile)

    def slot(self, tile: Index, place: Index) -> Index:
        """Return the slot of a place in a tile."""
        return self.topk + tile * self.tile + place

    def entry(self, first: Index, round_: Index, slot: Index) -> Index:
        """Return the entry in a slot that is not of the best so far."""
        return first + round_ * self.new + slot - self.topk

    def row(self, entry: Index, end: Index) -> Index:
        """Return the row to read for an entry: one that exists, as the range does."""
        return minimum(entry, end - 1)

    def exists(self, first: Index, end: Index, round_: Index, slot: Index) -> Truth:
        """Say whether a round has an entry of the range in such a slot."""
        entry = self.entry(first, round_, slot)
        return (slot >= self.topk) & (entry < end)


class Steps(NamedTuple):
    """Steps of a grid on TPU: one for each block of `size` entries of a row."""

    size: int
    count: Index

    def wanted(self, step: Index, first: Index, last: Index) -> Truth:
        """Say whether any query of the block may see entries of the step's block."""
        return (step >= first) & (step <= last)

    def read(self, step: Index, first: Index, last: Index) -> Index:
        """Return the block that is in memory at a step: those not wanted are not read."""
        return maximum(minimum(step, last), first)
