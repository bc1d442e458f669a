"""What is proved of the keys and entries that programs of sparse attention read and see.

The definition: query t sees the keys of its document at t - window + 1 to t, and the entries from
`first` to before `end`.
"""

from __future__ import annotations

from collections.abc import Iterator

from pallas_kernels.index_math import div, mod
from pallas_kernels.prove import Proof
from pallas_kernels.sparse_attention.index import (
    Bits,
    Blocks,
    Entries,
    Shares,
    Split,
    Window,
    first_block,
    last_block,
)

OPERATION = "sparse_attention"
TOKENS = 2**20  # in a row, at most
TILES = (32, 64)
LIST_TILE = 8  # shares that are added up at a time, of a list that is such a range
SHARE_ROWS = 2**23  # of a part of the queries, at most
SHARES = (32, 1), (512, 1), (1024, 2)  # chosen entries, groups of heads
PARTS = 16  # that share the queries of a tile, at most
QUERIES = (8, 16, 32, 64)  # of a block on TPU
KEY_BLOCK, ENTRY_BLOCK = 128, 512


def proofs(
    window: type[Window] = Window, entries: type[Entries] = Entries, bits: type[Bits] = Bits,
    split: type[Split] = Split, blocks: type[Blocks] = Blocks, shares: type[Shares] = Shares,
) -> Iterator[Proof]:
    """Yield what is to be proved, of the index functions of these kinds."""
    for tile in TILES:
        yield _window(window, tile)
        yield range_of_entries(entries, tile)
        yield _keys_of_queries(window, tile)
        yield _entries_of_queries(tile)
        yield _bits(bits, tile)
    yield range_of_entries(entries, LIST_TILE)
    for slots, groups in SHARES:
        yield _shares(shares, slots, groups)
    yield _pieces(split)
    for queries in QUERIES:
        yield _blocks_of_keys(blocks, queries)
        yield _blocks_of_entries(blocks, queries)
        yield _blocks_of_queries(blocks, queries)


def _query(proof: Proof):
    tokens = proof.integer("tokens", 1, TOKENS)
    query = proof.integer("query", 0, tokens - 1)
    return tokens, query, proof.integer("first_key", 0, query)


def _shown(query, first_key, width, key):
    """Say whether the definition shows a query a key."""
    return (key >= first_key) & (key > query - width) & (key <= query)


def _window(kind: type[Window], tile: int) -> Proof:
    """State that a window is a range, which `range_of_entries` speaks of."""
    proof = Proof(OPERATION, f"window, tiles of {tile}")
    tokens, query, first_key = _query(proof)
    width = proof.integer("window", 1, TOKENS)
    first, end = kind(width, tile).seen(query, first_key)
    proof.state("it is one of keys that exist", (first >= 0) & (first <= end) & (end <= tokens))
    key = proof.integer("key", 0, tokens - 1)
    proof.state("it is the definition", ((key >= first) & (key < end)).same_as(
        _shown(query, first_key, width, key)
    ))
    return proof


def range_of_entries(
    kind: type[Entries], tile: int, operation: str = OPERATION, kernel: str = "range of entries"
) -> Proof:
    """State that a query's tiles have the entries of its range, each once."""
    proof = Proof(operation, f"{kernel}, tiles of {tile}")
    count = proof.integer("entries", 1, TOKENS)
    first = proof.integer("first", 0, count)
    end = proof.integer("end", first, count)
    see = kind(tile)
    tiles = see.tiles(first, end)
    i, place = proof.integer("tile", 0, tiles - 1), proof.integer("place", 0, tile - 1)
    entry = see.entry(first, i, place)
    row = see.row(entry, end)
    proof.state("rows exist", (row >= 0) & (row < count))
    proof.state(
        "what is seen is the entry that is read, and shown",
        see.sees(end, entry).implies((row == entry) & (entry >= first) & (entry < end)),
    )
    shown = proof.integer("entry", 0, count - 1)
    in_definition = (shown >= first) & (shown < end)
    from_first = shown - first
    here = (i * tile <= from_first) & (from_first < (i + 1) * tile) & (
        place == from_first - i * tile
    )
    proof.state("a shown entry is seen at its place", (in_definition & here).implies(
        (entry == shown) & see.sees(end, entry)
    ))
    proof.state("and its tile is read", in_definition.implies(from_first < tiles * tile))
    other = proof.integer("tile'", 0, tiles - 1), proof.integer("place'", 0, tile - 1)
    proof.state("no entry is read twice", (see.entry(first, *other) == entry).implies(
        (other[0] == i) & (other[1] == place)
    ))
    return proof


def _keys_of_queries(kind: type[Window], tile: int) -> Proof:
    proof = Proof(OPERATION, f"gradient of keys, tiles of {tile}")
    tokens, query, first_key = _query(proof)
    width = proof.integer("window", 1, TOKENS)
    see = kind(width, tile)
    key = proof.integer("key", 0, tokens - 1)
    own = div(key, tile)
    begin, end = see.queries(own, tokens)
    shown = _shown(query, first_key, width, key)
    proof.state("a query that is shown a key is in its range",
                shown.implies((query >= begin) & (query < end)))
    proof.state("the mask is the definition", see.seen_by(query, first_key, key).same_as(shown))
    proof.state("queries exist", (begin >= 0) & (end <= tokens))
    return proof


def _entries_of_queries(tile: int) -> Proof:
    proof = Proof(OPERATION, f"gradient of entries, tiles of {tile}")
    tokens, query, _ = _query(proof)
    count = proof.integer("entries", 1, TOKENS)
    first, end = proof.integer("first", 0, count), proof.integer("end", 0, count)
    entry = proof.integer("entry", 0, count - 1)
    start = div(entry, tile) * tile
    begin, last = proof.integer("begin", 0, tokens), proof.integer("last", 0, tokens)
    # What the binary searches return, as neither `first` nor `end` falls along a row.
    proof.assume((query >= begin).same_as(end > start))
    proof.assume((query < last).same_as((first < start + tile) & (first < count)))
    proof.state(
        "a query that is shown an entry is in its tile's range",
        ((first <= entry) & (entry < end)).implies((begin <= query) & (query < last)),
    )
    return proof


def _bits(kind: type[Bits], tile: int) -> Proof:
    proof = Proof(OPERATION, f"chosen entries as bits, tiles of {tile}")
    count = proof.integer("entries", 1, TOKENS)
    bits = kind(count)
    entry, other = (proof.integer(name, 0, count - 1) for name in ("entry", "entry'"))
    word, bit = bits.word(entry), bits.bit(entry)
    proof.state("words exist", (word >= 0) & (word < bits.words))
    proof.state("bits exist", (bit >= 0) & (bit < 32))
    same = (bits.word(other) == word) & (bits.bit(other) == bit)
    proof.state("no two entries share a bit", same.implies(entry == other))
    start, place = entry - mod(entry, tile), mod(entry, tile)
    proof.state("a tile's words are neighbours", word == bits.word(start) + place)
    proof.state("a tile's bits are the same", bit == bits.bit(start))
    return proof


def _shares(kind: type[Shares], slots: int, groups: int) -> Proof:
    """State where the share is that a program of a query writes as [query, group, slot]."""
    proof = Proof(OPERATION, f"shares of {slots} entries by {groups} groups of heads")
    shares = kind(slots, groups)
    queries = proof.integer("queries", 1, max(1, SHARE_ROWS // shares.of_query))
    query = proof.integer("query", 0, queries - 1)
    place = proof.integer("place", 0, slots - 1)
    group = proof.integer("group", 0, groups - 1)
    row = shares.row(query * slots + place, group)
    proof.state("rows exist", (row >= 0) & (row < queries * groups * slots))
    written = (query * groups + group) * slots + place
    proof.state("the row that is added is the one that is written", row == written)
    return proof


def _pieces(kind: type[Split]) -> Proof:
    proof = Proof(OPERATION, "queries shared by programs")
    begin, end = proof.integer("begin", 0, TOKENS), proof.integer("end", 0, TOKENS)
    for parts in range(1, PARTS + 1):
        pieces = [kind(parts).piece(begin, end, part) for part in range(parts)]
        joined = pieces[0][0] == begin
        for (_, before), (after, _) in zip(pieces, pieces[1:], strict=False):
            joined &= before == after
        proof.state(f"{parts} pieces follow one another", (begin <= end).implies(joined))
        proof.state(f"{parts} pieces end at the end", (begin <= end).implies(pieces[-1][1] == end))
        nothing = pieces[0][0] >= pieces[0][1]
        proof.state(f"{parts} pieces of nothing are empty", (begin > end).implies(nothing))
    return proof


def _block_and_query(proof: Proof, blocks: Blocks, own: int):
    """Return a block of queries, one of these and its first key.

    Args:
      own: blocks of keys that are the queries' own.
    """
    block = proof.integer("block", 0, own * (KEY_BLOCK // blocks.queries) - 1)
    query = blocks.query(block, proof.integer("place", 0, blocks.queries - 1))
    return block, query, proof.integer("first_key", 0, query)


def _blocks_of_keys(kind: type[Blocks], queries: int) -> Proof:
    proof = Proof(OPERATION, f"TPU, keys for blocks of {queries} queries")
    width = proof.integer("window", 1, TOKENS)
    key_blocks = proof.integer("blocks of keys", 1, TOKENS // KEY_BLOCK)
    before = proof.integer("of these before", 0, key_blocks - 1)
    blocks = kind(width, queries, KEY_BLOCK, ENTRY_BLOCK, before * KEY_BLOCK)
    block, query, first_key = _block_and_query(proof, blocks, key_blocks - before)
    proof.state("queries are keys", (query >= 0) & (query < key_blocks * KEY_BLOCK))
    key = proof.integer("key", 0, query)
    shown = _shown(query, first_key, width, key)
    own = div(key, KEY_BLOCK)
    step_of_key = own - blocks.key_block(block, 0)
    proof.state("a shown key has a step", shown.implies(
        (step_of_key >= 0) & (step_of_key < blocks.window_steps)
    ))
    proof.state("the mask is the definition", blocks.shows(query, first_key, key).same_as(shown))
    step, other = (proof.integer(x, 0, blocks.window_steps - 1) for x in ("step", "step'"))
    here, there = (blocks.key_block(block, x) for x in (step, other))
    proof.state("no block has two steps", (here == there).implies(step == other))
    read = blocks.key_block_read(block, step)
    proof.state("a step's block is the one that is read", (here >= 0).implies(read == here))
    any_step = proof.integer("any step", 0, TOKENS)
    read = blocks.key_block_read(block, any_step)
    proof.state("blocks that are read exist", (read >= 0) & (read < key_blocks))
    return proof


def _blocks_of_entries(kind: type[Blocks], queries: int) -> Proof:
    proof = Proof(OPERATION, f"TPU, entries for blocks of {queries} queries")
    width = proof.integer("window", 1, TOKENS)
    blocks = kind(width, queries, KEY_BLOCK, ENTRY_BLOCK)
    count = proof.integer("blocks of entries", 1, TOKENS // ENTRY_BLOCK)
    first = proof.integer("first", 0, count - 1)
    last = proof.integer("last", first, count - 1)
    step = proof.integer("step", 0, blocks.window_steps + count - 1)
    block, read = blocks.entry_block(step), blocks.entry_block_read(step, first, last)
    wanted = (first <= block) & (block <= last)
    proof.state("blocks that are read exist", (read >= 0) & (read < count))
    proof.state("a wanted block is the one that is read", wanted.implies(read == block))
    least, most = proof.integer("least first", 0, count * ENTRY_BLOCK), proof.integer(
        "largest end", 0, count * ENTRY_BLOCK
    )
    begin, stop = first_block(least, most, ENTRY_BLOCK), last_block(most, ENTRY_BLOCK)
    proof.state("ranges of blocks are of blocks that exist",
                (begin >= 0) & (begin <= stop) & (stop < count))
    seen = proof.integer("seen entry", 0, count * ENTRY_BLOCK - 1)
    of_seen = div(seen, ENTRY_BLOCK)
    proof.state("and have every entry that a query of the block sees",
                ((least <= seen) & (seen < most)).implies((begin <= of_seen) & (of_seen <= stop)))
    some = proof.integer("some block", 0, count - 1)
    step_of_block = blocks.window_steps + some
    proof.state("every block has a step", blocks.entry_block(step_of_block) == some)
    entry = read * ENTRY_BLOCK + proof.integer("place", 0, ENTRY_BLOCK - 1)
    bits = Bits(count * ENTRY_BLOCK)
    lane = mod(entry, Bits.LANES)
    proof.state("an entry's word is read",
                bits.word(entry) == blocks.word_block(read) * Bits.LANES + lane)
    group = div(entry - read * ENTRY_BLOCK, Bits.LANES)
    proof.state("and its bit is looked at", bits.bit(entry) == blocks.first_bit(read) + group)
    return proof


def _blocks_of_queries(kind: type[Blocks], queries: int) -> Proof:
    proof = Proof(OPERATION, f"TPU, blocks of {queries} queries for keys")
    width = proof.integer("window", 1, TOKENS)
    blocks = kind(width, queries, KEY_BLOCK, ENTRY_BLOCK)
    key_blocks = proof.integer("blocks of keys", 1, TOKENS // KEY_BLOCK)
    block, query, first_key = _block_and_query(proof, blocks, key_blocks)
    key = proof.integer("key", 0, query)
    own = div(key, KEY_BLOCK)
    step_of_query = block - blocks.query_block(own, 0)
    proof.state("a query that is shown a key has a step", _shown(
        query, first_key, width, key
    ).implies((step_of_query >= 0) & (step_of_query < blocks.query_steps)))
    last = key_blocks * (KEY_BLOCK // queries) - 1
    step = proof.integer("step", 0, blocks.query_steps - 1)
    here, read = blocks.query_block(own, step), blocks.query_block_read(own, step, last)
    proof.state("a step's block is the one that is read", (here <= last).implies(read == here))
    proof.state("blocks that are read exist", (read >= 0) & (read <= last))
    first = proof.integer("first", 0, last + 1)
    end = proof.integer("end", 0, last + 1)
    any_step = proof.integer("any step", 0, last)
    read = blocks.clamped(any_step, first, end)
    proof.state("of a range, too", (read >= 0) & (read <= last))
    proof.state("and a wanted one is read",
                ((any_step >= first) & (any_step < end)).implies(read == any_step))
    return proof
