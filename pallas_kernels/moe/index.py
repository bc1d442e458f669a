"""Where the rows of routed experts lie, and what each step of a grid works on.

The rows of an expert fill whole blocks of `size` rows. A slot is one of a token's choices: slot =
token * choices + choice.
"""

from __future__ import annotations

from typing import NamedTuple

from pallas_kernels.index_math import Index, Truth, cdiv, maximum, minimum


class Grouped(NamedTuple):
    """Blocks of rows, one expert's each, the experts' one after the other."""

    size: int  # rows of a block

    def blocks(self, rows: Index) -> Index:
        """Return how many blocks an expert's rows fill."""
        return cdiv(rows, self.size)

    def most_blocks(self, slots: Index, experts: Index) -> Index:
        """Return the most blocks that any choice of experts fills."""
        return minimum(slots // self.size + experts, slots)

    def most_visits(self, slots: Index, experts: Index) -> Index:
        """Return the most visits: one for each block, and one for each expert without."""
        return slots // self.size + experts

    def row(self, block: Index, within: Index = 0) -> Index:
        """Return a row of a block."""
        return block * self.size + within

    def token(self, found: Index, tokens: Index) -> tuple[Index, Truth]:
        """Return the token to load for a row, and whether it counts: one past the last does not."""
        return minimum(found, tokens - 1), found < tokens

    # One axis of programs.

    def program(self, number: Index, tiles: int) -> tuple[Index, Index]:
        """Return the block and the tile of columns of a program; a block's tiles come together."""
        return number // tiles, number % tiles

    def square(self, number: Index, down: int, across: int) -> tuple[Index, Index, Index]:
        """Return the expert and the tile of its weights of a program."""
        return number // (down * across), number // across % down, number % across

    def steps(self, first: Index, end: Index, depth: int) -> tuple[Index, Index]:
        """Return the first and the last but one step of `depth` rows through blocks first...end."""
        return self.row(first) // depth, self.row(end) // depth

    # Block indices at a step (tile, block) or (down, across, visit) of a grid that reads arrays of
    # a plan beforehand.

    def live(self, block: Index, used: Index) -> Index:
        """Return the block to hold: past the blocks in use still the last, so nothing is copied."""
        return minimum(block, maximum(used - 1, 0))

    def rows_at(self, tile: Index, block: Index, owner, used) -> tuple[Index, Index]:
        """Return the block of an array of rows, all columns."""
        return self.live(block, used[0]), 0

    def tile_at(self, tile: Index, block: Index, owner, used) -> tuple[Index, Index]:
        """Return the block of an array of rows, one tile of columns."""
        return self.live(block, used[0]), tile

    def part_at(self, tile: Index, block: Index, owner, used) -> tuple[Index, Index, Index]:
        """Return the block of sums over a tile's columns."""
        return tile, self.live(block, used[0]), 0

    def columns_at(self, tile: Index, block: Index, owner, used) -> tuple[Index, Index, Index]:
        """Return the block of an expert's weights [e, in, out]: a tile of `out`."""
        return owner[self.live(block, used[0])], 0, tile

    def turned_at(self, tile: Index, block: Index, owner, used) -> tuple[Index, Index, Index]:
        """Return the block of an expert's weights [e, in, out]: a tile of `in`."""
        return owner[self.live(block, used[0])], tile, 0

    def left_at(self, down: Index, across: Index, visit: Index, expert, block, filled):
        """Return the block of the left factor's rows."""
        return block[visit], down

    def right_at(self, down: Index, across: Index, visit: Index, expert, block, filled):
        """Return the block of the right factor's rows."""
        return block[visit], across

    def weights_at(self, down: Index, across: Index, visit: Index, expert, block, filled):
        """Return the block of the experts' weights."""
        return expert[visit], down, across

    def first(self, visit: Index, expert) -> Truth:
        """Say whether a visit is an expert's first; visits of one expert come together."""
        return (visit == 0) | (expert[maximum(visit - 1, 0)] != expert[visit])

    def last(self, visit: Index, visits: int, expert) -> Truth:
        """Say whether a visit is an expert's last."""
        return (visit == visits - 1) | (expert[minimum(visit + 1, visits - 1)] != expert[visit])


class Packed(NamedTuple):
    """FP4 codes of a row of weights, two in a byte, and the row they are multiplied with.

    That row has what is multiplied with the low halves first, then what is with the high ones.
    """

    inner: Index  # bytes of codes
    shared: int  # bytes of codes that share a scale

    def scale(self, byte: Index) -> Index:
        """Return the scale of a byte."""
        return byte // self.shared

    def odd(self, byte: Index) -> Index:
        """Return the column that is multiplied with a byte's high half."""
        return self.inner + byte
