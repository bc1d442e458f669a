"""What a query reads of a cache, how programs share it, and what of it the query sees.

The keys of a query come in tiles: those of the ring, of the new tokens, of its entries.
"""

from __future__ import annotations

from typing import NamedTuple

from pallas_kernels.index_math import Index, Truth, cdiv, maximum, minimum, mod, where
from pallas_kernels.sparse_attention.index import last_block


class Ring(NamedTuple):
    """The keys of the last `slots` tokens, at their positions modulo the slots.

    A call's queries stand at positions from `start` on; the ring is as before them.
    """

    slots: int

    def position(self, slot: Index, start: Index) -> Index:
        """Return the position of the token in a slot; negative: there is none."""
        next_slot = mod(start, self.slots)
        return start - next_slot + slot - where(slot < next_slot, 0, self.slots)

    def sees(self, place: Index, slot: Index, start: Index) -> Truth:
        """Say whether the query at a place of the call sees the token in a slot."""
        position = self.position(slot, start)
        return (position >= 0) & (position > start + place - self.slots)


def sees_new(place: Index, token: Index) -> Truth:
    """Say whether the query at a place of the call sees a token of the call."""
    return token <= place


class Tiles(NamedTuple):
    """The tiles of one query: first the ring's, then one of the new tokens, then the entries'."""

    tile: int  # keys of a tile
    slots: int  # of the ring

    @property
    def ring_tiles(self) -> int:
        """Return how many tiles hold the ring."""
        return cdiv(self.slots, self.tile)

    def count(self, end: Index) -> Index:
        """Return how many tiles there are for `end` entries."""
        return self.ring_tiles + 1 + cdiv(end, self.tile)

    def ring(self, first: Index, last: Index) -> tuple[Index, Index]:
        """Return which tiles of the ring a piece [first, last) of all tiles has."""
        return first, minimum(last, self.ring_tiles)

    def new(self, first: Index, last: Index) -> tuple[Index, Index]:
        """Return [0, 1) if a piece has the tile of new tokens, else an empty range."""
        return maximum(first - self.ring_tiles, 0), minimum(last - self.ring_tiles, 1)

    def entries(self, first: Index, last: Index) -> tuple[Index, Index]:
        """Return which tiles of entries a piece has."""
        before = self.ring_tiles + 1
        return maximum(first - before, 0), last - before

    def key(self, tile: Index, place: Index) -> Index:
        """Return the slot or entry at a place of a tile."""
        return tile * self.tile + place

    def row(self, key: Index, end: Index) -> Index:
        """Return the row to read for a slot or entry of `end`: one that exists, if any does."""
        return maximum(minimum(key, end - 1), 0)


class Split(NamedTuple):
    """The tiles of a query in pieces, each for a program of its own.

    A piece has at least `least` tiles, as its result is larger than a few tiles. How the tiles of
    one query are split depends on their number alone.
    """

    parts: int
    least: int

    def size(self, tiles: Index) -> Index:
        """Return the number of tiles of a piece."""
        return maximum(cdiv(tiles, self.parts), self.least)

    def piece(self, tiles: Index, part: Index) -> tuple[Index, Index]:
        """Return the range of tiles of a piece: first and end."""
        size = self.size(tiles)
        first = minimum(part * size, tiles)
        return first, minimum(first + size, tiles)

    def used(self, tiles: Index, part: Index) -> Truth:
        """Say whether a piece has any tile; after one that has none, no other has."""
        return part * self.size(tiles) < tiles


class Column(NamedTuple):
    """Columns of a stored row from `first` on, `count` of them, read as a power of two."""

    first: int
    count: int

    def at(self, place: Index) -> Index:
        """Return the column to read for a place; places past the last read it again."""
        return self.first + minimum(place, self.count - 1)


class Steps(NamedTuple):
    """The steps of a TPU's grid for one query: the ring with the new tokens, then entries."""

    entries: int  # of a block

    def block(self, step: Index) -> Index:
        """Return the block of entries of a step; below 0 it is the ring's."""
        return step - 1

    def first(self, step: Index) -> Index:
        """Return the first entry of a step's block."""
        return self.block(step) * self.entries

    def wanted(self, step: Index, end: Index) -> Truth:
        """Say whether a step's block has an entry before `end`."""
        return (self.block(step) >= 0) & (self.first(step) < end)

    def read(self, step: Index, end: Index) -> Index:
        """Return the block that is in memory at a step: those past the end are not read."""
        return maximum(minimum(self.block(step), last_block(end, self.entries)), 0)
