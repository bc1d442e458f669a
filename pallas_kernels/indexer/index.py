"""Which entries a program of the indexer scores at a time, and where it keeps them."""

from __future__ import annotations

from typing import NamedTuple

from pallas_kernels.index_math import Index, Truth, cdiv, maximum, minimum


class Programs(NamedTuple):
    """The queries of a row, shared by `count` programs: each takes every count-th."""

    tokens: Index
    count: int

    def length(self, program: Index) -> Index:
        """Return how many queries a program takes."""
        return cdiv(maximum(self.tokens - program, 0), self.count)

    def token(self, program: Index, n: Index) -> Index:
        """Return the token of a program's n-th query."""
        return program + n * self.count


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


class Merge(NamedTuple):
    """The best of `parts` parts of a query's entries, merged by `size` neighbouring ones.

    Both are powers of two: groups are whole.
    """

    parts: int
    size: int

    @property
    def groups(self) -> int:
        """Return how many groups there are."""
        return self.parts // self.size


class Packed(NamedTuple):
    """The bytes of a packed key: those of codes by groups that share a scale, then the scales."""

    groups: int
    size: int  # bytes of codes of a group

    def code(self, group: Index, place: Index) -> Index:
        """Return a byte of codes."""
        return group * self.size + place

    def scale(self, group: Index) -> Index:
        """Return the byte of a group's scale."""
        return self.groups * self.size + group


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


class Tiled(NamedTuple):
    """A row's entries on TPU: blocks in memory, tiles that are scored, rows of lanes that keep it.

    A chunk is as many rows as there are lanes.
    """

    block: int
    tile: int  # divides the block
    lanes: int  # divide the tile

    def rows(self, blocks: int) -> int:
        """Return how many rows hold so many blocks: whole chunks."""
        return cdiv(blocks * self.block, self.lanes * self.lanes) * self.lanes

    def entry(self, step: Index, tile: Index) -> Index:
        """Return the first entry of a tile."""
        return step * self.block + tile * self.tile

    def row(self, step: Index, tile: Index) -> Index:
        """Return the first row that holds a tile."""
        return step * (self.block // self.lanes) + tile * (self.tile // self.lanes)

    def chunks(self, last: Index) -> Index:
        """Return how many chunks hold all blocks up to the last."""
        return cdiv((last + 1) * self.block, self.lanes * self.lanes)

    def number(self, chunk: Index, row: Index, lane: Index) -> Index:
        """Return the entry at a place of a chunk."""
        return (chunk * self.lanes + row) * self.lanes + lane
