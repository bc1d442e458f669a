"""Which rows and channels of values and gates an entry is made of."""

from __future__ import annotations

import math
from typing import NamedTuple

from pallas_kernels.index_math import Index, Truth, maximum, mod, where

SUBLANES = 8


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
        return mod(slot, self.ratio) * self.series + self._last(slot)

    def _last(self, slot: Index) -> Index:
        return where(self.own(slot), self.series - 1, 0)

    def used(self, slot: Index, has_previous: Truth) -> Truth:
        """Say whether a slot is of a block that there is."""
        return (self.own(slot) | has_previous) & (slot < self.slots)


class Channels(NamedTuple):
    """Some of an entry's channels."""

    count: int
    first: int
    step: int

    def at(self, i: Index) -> Index:
        """Return the i-th of them."""
        return self.first + i * self.step

    def there(self, i: Index) -> Truth:
        """Say whether there are so many."""
        return i < self.count


def parts(width: int, angles: int) -> tuple[Channels, Channels, Channels]:
    """Return the channels that are not rotated, and the first and second ones of rotated pairs."""
    plain = width - 2 * angles
    return Channels(plain, 0, 1), Channels(angles, plain, 2), Channels(angles, plain + 1, 2)


class Rows(NamedTuple):
    """Blocks of entries on TPU, whose tokens follow each other."""

    ratio: int
    entries: int  # of a block, a multiple of 8

    @property
    def tokens(self) -> int:
        """Tokens of a block."""
        return self.ratio * self.entries

    @property
    def tokens_before(self) -> int:
        """Tokens that are read of those before, in whole tiles: the last are an entry's block."""
        return math.lcm(SUBLANES, self.ratio)

    def before(self, block: Index) -> Index:
        """Return which piece of so many tokens ends where a block begins; for the first block: 0.

        What is read for the first block is not used.
        """
        return maximum(block * (self.tokens // self.tokens_before) - 1, 0)

    def from_last(self, step: Index, blocks: Index) -> Index:
        """Return the block of a step that goes from the last to the first."""
        return blocks - 1 - step
