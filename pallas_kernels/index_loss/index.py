"""Where a program that owns a tile of entries finds what queries that chose some of them keep."""

from __future__ import annotations

from typing import NamedTuple

from pallas_kernels.index_math import Index, Truth, minimum


class Slots(NamedTuple):
    """The slots of a query's `chosen` entries, which ascend, in an aligned tile of entries.

    They follow one another from the first slot whose entry does not come before the tile.
    """

    tile: int
    chosen: Index  # slots of a query

    def slot(self, first: Index, place: Index) -> Index:
        """Return one of the `tile` slots that are read: one that exists, as the first may not."""
        return minimum(first + place, self.chosen - 1)

    def own(self, tile: Index, first: Index, place: Index, entry: Index) -> Truth:
        """Say whether the entry in a slot that is read is of the tile, and read there once."""
        start = tile * self.tile
        exists = first + place < self.chosen
        return exists & (entry >= start) & (entry < start + self.tile)
