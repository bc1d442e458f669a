"""Which tokens and columns each step of a grid takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pallas_kernels.index_math import Index, minimum


class Blocks(NamedTuple):
    """Blocks of whole tokens, for grids (block of tokens, slice of each stream's columns)."""

    tokens: Index  # blocks of them

    def streams(self, i: Index, j: Index = 0) -> tuple[Index, ...]:
        """Return the block of [tokens, streams, columns]."""
        return i, 0, j

    def rows(self, i: Index, j: Index = 0) -> tuple[Index, ...]:
        """Return the block of [tokens, columns], with all streams' columns or one's."""
        return i, j

    def gates(self, i: Index, j: Index = 0) -> tuple[Index, ...]:
        """Return the block of [gates, tokens]."""
        return 0, i

    def own_gates(self, i: Index, j: Index = 0) -> tuple[Index, ...]:
        """Return the block of [blocks of tokens, gates, tokens of a block]."""
        return i, 0, 0

    def partial(self, i: Index, j: Index) -> tuple[Index, ...]:
        """Return the block of [slices, gates, tokens]."""
        return j, 0, i

    def all_partial(self, i: Index, j: Index = 0) -> tuple[Index, ...]:
        """Return the block of [slices, gates, tokens], with all slices."""
        return 0, 0, i

    def weights(self, i: Index, j: Index) -> tuple[Index, ...]:
        """Return the block of [parts, streams, columns, gates]."""
        return 0, 0, j, 0

    def reversed(self, block: Callable[..., tuple[Index, ...]]) -> Callable[..., tuple[Index, ...]]:
        """Return an index map for programs that begin with the last tokens."""
        return lambda i, j: block(self.tokens - 1 - i, j)


class Groups(NamedTuple):
    """Tokens in tiles, tiles in groups: for grids (slice of columns, group of tiles).

    A program takes the tiles of its group one after the other.
    """

    tiles: Index
    per_group: int

    @property
    def count(self) -> Index:
        """How many groups there are."""
        return (self.tiles + self.per_group - 1) // self.per_group

    def first(self, group: Index) -> Index:
        """Return the first tile of a group."""
        return group * self.per_group

    def length(self, group: Index) -> Index:
        """Return how many tiles a group has."""
        return minimum(self.tiles - self.first(group), self.per_group)

    def streams(self, j: Index, group: Index) -> tuple[Index, ...]:
        """Return the block of [tokens, streams, columns], with all tokens."""
        return 0, 0, j

    def rows(self, j: Index, group: Index) -> tuple[Index, ...]:
        """Return the block of [tokens, columns], with all tokens."""
        return 0, j

    def gates(self, j: Index, group: Index) -> tuple[Index, ...]:
        """Return the block of [gates, tokens], with all tokens."""
        return 0, 0

    def partial(self, j: Index, group: Index) -> tuple[Index, ...]:
        """Return the block of [slices, gates, tokens], with all tokens."""
        return j, 0, 0

    def weights(self, j: Index, group: Index) -> tuple[Index, ...]:
        """Return the block of [parts, streams, columns, gates]."""
        return 0, 0, j, 0

    def weight_sums(self, j: Index, group: Index) -> tuple[Index, ...]:
        """Return the block of [groups, streams, columns, gates]."""
        return group, 0, j, 0
