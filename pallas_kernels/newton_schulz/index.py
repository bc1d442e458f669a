"""Which tile of a symmetric product each step of a grid computes: those of one triangle."""

from __future__ import annotations

from typing import NamedTuple

from pallas_kernels.index_math import Index, div, mod, where


class Triangle(NamedTuple):
    """The tiles (i, j), i >= j, of a square of `tiles` by `tiles`, laid out in a rectangle.

    The first half of the triangle's columns lie in the rectangle as they are. The others fill what
    is free above these, turned by a quarter.
    """

    tiles: Index

    @property
    def grid(self) -> tuple[Index, Index]:
        """Rows and columns of the rectangle, which has one place for each tile."""
        half = div(self.tiles + 1, 2)
        return 2 * half + 1 - 2 * self._odd, half

    @property
    def _odd(self) -> Index:
        return mod(self.tiles, 2)

    def tile(self, row: Index, column: Index) -> tuple[Index, Index]:
        """Return the tile at a place of the rectangle."""
        half, odd = self.grid[1], self._odd
        in_place = row + odd > column
        i = where(in_place, row + odd - 1, half + column - odd)
        return i, where(in_place, column, half + row)

    def place(self, i: Index, j: Index) -> tuple[Index, Index]:
        """Return the place of a tile: `tile` the other way round."""
        half, odd = self.grid[1], self._odd
        in_place = j < half
        return where(in_place, i + 1 - odd, j - half), where(in_place, j, i - half + odd)

    # The blocks of a stack of matrices at a step of the grid (matrix, row, column, part).

    def left(self, z: Index, row: Index, column: Index, part: Index = 0) -> tuple[Index, ...]:
        """Return the block of x whose rows are the tile's rows."""
        return z, self.tile(row, column)[0], part

    def right(self, z: Index, row: Index, column: Index, part: Index = 0) -> tuple[Index, ...]:
        """Return the block of x whose rows are the tile's columns."""
        return z, self.tile(row, column)[1], part

    def own(self, z: Index, row: Index, column: Index, part: Index = 0) -> tuple[Index, ...]:
        """Return the block of the product."""
        return z, *self.tile(row, column)
