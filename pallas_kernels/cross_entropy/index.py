"""Which logits each step of a grid computes, and where it puts what it finds out about them."""

from __future__ import annotations

from typing import NamedTuple

from pallas_kernels.index_math import Index, Truth, cdiv

LANES = 128  # of a vector register of a TPU


class Tile(NamedTuple):
    """The logits of one step."""

    rows: int  # tokens
    columns: int  # ids


class LogitGrid(NamedTuple):
    """The tiles (i, j) of the logits of whole blocks of tokens and a vocabulary of any size."""

    tokens: Index  # a multiple of a tile's rows
    vocabulary: Index
    tile: Tile

    @property
    def grid(self) -> tuple[Index, Index]:
        """Tiles of tokens and of the vocabulary.

        On a GPU programs that differ in the first are neighbours: they share columns of the head.
        """
        return self.tokens // self.tile.rows, cdiv(self.vocabulary, self.tile.columns)

    def column(self, j: Index, c: Index) -> Index:
        """Return the id whose logit is in column c of a tile."""
        return j * self.tile.columns + c

    def place(self, j: Index, target: Index) -> Index:
        """Return the column in which the logit of an id is; of other tiles, one there is not."""
        return target - self.column(j, 0)

    def exists(self, j: Index, c: Index) -> Truth:
        """Say whether there is such an id: the last tile may reach beyond them."""
        return self.column(j, c) < self.vocabulary

    def has(self, j: Index, target: Index) -> Truth:
        """Say whether a tile has the logit of an id."""
        place = self.place(j, target)
        return (place >= 0) & (place < self.tile.columns)

    # Blocks of the operands and results.

    def hidden(self, i: Index, j: Index) -> tuple[Index, Index]:
        """Return the block of [tokens, width]."""
        return i, 0

    def head(self, i: Index, j: Index) -> tuple[Index, Index]:
        """Return the block of [width, ids], of which the last may be a part only."""
        return 0, j

    def logits(self, i: Index, j: Index) -> tuple[Index, Index]:
        """Return the block of [tokens, ids]."""
        return i, j

    def each_token(self, i: Index, j: Index) -> tuple[Index]:
        """Return the block of [tokens]."""
        return (i,)

    def column_of_tokens(self, i: Index, j: Index) -> tuple[Index, Index]:
        """Return the block of [tokens, 1]."""
        return i, 0

    def tile_major(self, i: Index, j: Index) -> tuple[Index, Index]:
        """Return the block of [tiles of ids, tokens], of one row: a GPU writes neighbours."""
        return j, i

    def lanes(self, i: Index, j: Index) -> tuple[Index, Index]:
        """Return the block of [tokens, tiles of ids], which LANES steps of a TPU share."""
        return i, j // LANES

    def lane(self, j: Index) -> Index:
        """Return the tile's column in that block."""
        return j % LANES
