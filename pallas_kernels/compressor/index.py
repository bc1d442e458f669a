"""Which rows of values and gates an entry is made of."""

from __future__ import annotations

from typing import NamedTuple

from pallas_kernels.index_math import Index, Truth, maximum, where


class Block(NamedTuple):
    """The slots of an entry: with two series first those of the block before, then its own.

    Arrays have a row for each series of each token, those of a token side by side.
    """

    ratio: int
    series: int

    @property
    def slots(self) -> int:
        """Rows that an entry is made of."""
        return self.ratio * self.series

    def own(self, slot: Index) -> Truth:
        """Say whether a slot is of the entry's own block."""
        return slot >= self.slots - self.ratio

    def row(self, start: Index, slot: Index) -> Index:
        """Return the row of a slot of the entry whose block begins at token `start`.

        Where no block is before, it is a row that there is, but not one to be used.
        """
        token = start + slot - (self.slots - self.ratio)
        return maximum(token * self.series + self._last(slot), 0)

    def bias(self, slot: Index) -> Index:
        """Return the row of a slot's position bias."""
        return slot % self.ratio * self.series + self._last(slot)

    def _last(self, slot: Index) -> Index:
        return where(self.own(slot), self.series - 1, 0)

    def used(self, slot: Index, has_previous: Truth) -> Truth:
        """Say whether a slot is of a block that there is."""
        return self.own(slot) | has_previous
