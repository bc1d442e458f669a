"""Which keys and entries a program of sparse attention reads, and which of them a query sees."""

from __future__ import annotations

from typing import NamedTuple

from pallas_kernels.index_math import Index, Truth, cdiv, div, maximum, minimum, mod


class Window(NamedTuple):
    """The keys of a query: the last `window` tokens of its document."""

    window: int
    tile: int  # keys that are read at a time, or whose gradients one program owns

    def first(self, query: Index, first_key: Index) -> Index:
        """Return the first key that a query sees."""
        return maximum(first_key, query - self.window + 1)

    def seen(self, query: Index, first_key: Index) -> tuple[Index, Index]:
        """Return the range of keys that a query sees: first and end."""
        return self.first(query, first_key), query + 1

    # The other way round, for gradients of keys: programs own tiles of keys, aligned to `tile`.

    def queries(self, tile: Index, tokens: Index) -> tuple[Index, Index]:
        """Return the range of queries that may see a key of an aligned tile: first and end."""
        start = tile * self.tile
        return start, minimum(start + self.tile + self.window - 1, tokens)

    def seen_by(self, query: Index, first_key: Index, key: Index) -> Truth:
        """Say whether a key is one that the query sees."""
        return (key <= query) & (key >= self.first(query, first_key))


class Entries(NamedTuple):
    """A range of entries that a query sees, or of keys, in tiles of `tile`."""

    tile: int

    def tiles(self, first: Index, end: Index) -> Index:
        """Return how many tiles hold the range."""
        return cdiv(maximum(end - first, 0), self.tile)

    def entry(self, first: Index, tile: Index, place: Index) -> Index:
        """Return the entry at a place of a tile of the range."""
        return first + tile * self.tile + place

    def sees(self, end: Index, entry: Index) -> Truth:
        """Say whether an entry of one of the tiles is within the range."""
        return entry < end

    def row(self, entry: Index, end: Index) -> Index:
        """Return the row to read for an entry of a tile: one that exists, as the range does."""
        return minimum(entry, end - 1)


class Bits(NamedTuple):
    """Entries that a query has chosen, a bit for each, in words of 32 bits.

    Entry 4096 w + 128 i + j has bit i of word 128 w + j: of 128 neighbouring entries, a vector
    register's lanes, each has the same bit of another word.
    """

    LANES = 128
    WORD = 32

    entries: int

    @property
    def words(self) -> int:
        """How many there are for a query."""
        return cdiv(self.entries, self.LANES * self.WORD) * self.LANES

    def word(self, entry: Index) -> Index:
        """Return the word of an entry."""
        return div(entry, self.LANES * self.WORD) * self.LANES + mod(entry, self.LANES)

    def bit(self, entry: Index) -> Index:
        """Return the place of its bit in the word."""
        return mod(div(entry, self.LANES), self.WORD)


class Shares(NamedTuple):
    """Rows of what queries give to chosen entries: of a query group after group of its heads."""

    slots: int  # chosen entries of a query
    groups: int

    @property
    def of_query(self) -> int:
        """Return how many rows a query has."""
        return self.slots * self.groups

    def row(self, slot: Index, group: Index) -> Index:
        """Return the row of a group's share, where slot counts through all queries."""
        query = div(slot, self.slots)
        return query * self.of_query + group * self.slots + mod(slot, self.slots)


class Split(NamedTuple):
    """A range of queries in `parts` pieces, each for a program of its own."""

    parts: int

    def piece(self, begin: Index, end: Index, part: Index) -> tuple[Index, Index]:
        """Return where a piece begins and ends."""
        size = cdiv(maximum(end - begin, 0), self.parts)
        first = minimum(begin + part * size, end)
        return first, minimum(first + size, end)


def first_block(first: Index, end: Index, size: int) -> Index:
    """Return the first block with entries from `first` to before `end`, or one that exists."""
    return minimum(div(first, size), last_block(end, size))


def last_block(end: Index, size: int) -> Index:
    """Return the last block with entries before `end`, or one that exists."""
    return div(maximum(end, 1) - 1, size)


class Blocks(NamedTuple):
    """The blocks of a grid (row, block of queries, step) on TPU.

    The first steps are for blocks of keys, the last of which holds the queries themselves, the
    others for blocks of entries, from the first to the last that any of the queries sees.
    """

    window: int
    queries: int  # of a block; divides `keys`
    keys: int  # of a block
    entries: int  # of a block
    before: int = 0  # keys in front of the first query's own; a multiple of `keys`

    @property
    def window_steps(self) -> Index:
        """Return how many blocks hold the windows of a block of queries."""
        return 1 + cdiv(self.window - 1, self.keys)

    def query(self, block: Index, place: Index) -> Index:
        """Return where a query of a block stands among the keys."""
        return self.before + block * self.queries + place

    def key_block(self, block: Index, step: Index) -> Index:
        """Return the block of keys of a step; below 0 there is none."""
        return div(self.query(block, 0), self.keys) - (self.window_steps - 1) + step

    def key_block_read(self, block: Index, step: Index) -> Index:
        """Return the block of keys that is in memory at a step."""
        return maximum(self.key_block(block, minimum(step, self.window_steps - 1)), 0)

    def entry_block(self, step: Index) -> Index:
        """Return the block of entries of a step; below 0 it is a step for keys."""
        return step - self.window_steps

    def entry_block_read(self, step: Index, first: Index, last: Index) -> Index:
        """Return the block of entries that is in memory at a step: those not seen are not read."""
        return maximum(minimum(self.entry_block(step), last), first)

    def shows(self, query: Index, first_key: Index, key: Index) -> Truth:
        """Say whether a query sees a key."""
        return (key <= query) & (key > query - self.window) & (key >= first_key)

    def word_block(self, entry_block: Index) -> Index:
        """Return the block of 128 words that has the bits of a block of entries."""
        return div(entry_block * self.entries, Bits.LANES * Bits.WORD)

    def first_bit(self, entry_block: Index) -> Index:
        """Return the bit that its first 128 entries have; the next 128 have the next one."""
        return mod(div(entry_block * self.entries, Bits.LANES), Bits.WORD)

    # The other way round, for gradients: a grid (row, block of keys, step), steps for queries. No
    # keys are before these.

    @property
    def query_steps(self) -> Index:
        """Return how many blocks of queries may see a block of keys."""
        return cdiv(self.keys + self.window - 1, self.queries)

    def query_block(self, key_block: Index, step: Index) -> Index:
        """Return the block of queries of a step; it may lie past the last."""
        return div(key_block * self.keys, self.queries) + step

    def query_block_read(self, key_block: Index, step: Index, last: Index) -> Index:
        """Return the block of queries that is in memory at a step."""
        return minimum(self.query_block(key_block, step), last)

    def clamped(self, step: Index, first: Index, end: Index) -> Index:
        """Return the block of a range that is in memory at a step; of none, block 0."""
        return maximum(minimum(maximum(step, first), end - 1), 0)
