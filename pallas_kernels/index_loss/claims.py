"""What is proved of the entries that programs of the indexer's loss read.

What TPUs read, the ranges of queries and the bits of entries are those of sparse attention and of
the indexer.
"""

from __future__ import annotations

from collections.abc import Iterator

from pallas_kernels.index_loss import gpu, gpu_keys
from pallas_kernels.index_loss.index import Slots
from pallas_kernels.prove import Proof
from pallas_kernels.sparse_attention.claims import range_of_entries
from pallas_kernels.sparse_attention.index import Entries

OPERATION = "index_loss"
TOKENS = 2**20  # in a row, at most
# Of entries, for a query.
TILES = {gpu.FORWARD_CHOSEN.entries, gpu.FORWARD_RANGE.entries, gpu.GRADIENT_CHOSEN.entries,
         gpu.GRADIENT_RANGE.entries, gpu.GRADIENT_RANGE_MANY.entries}  # fmt: skip


def proofs(slots: type[Slots] = Slots, entries: type[Entries] = Entries) -> Iterator[Proof]:
    """Yield what is to be proved, of the index functions of these kinds."""
    yield _slots(slots, gpu_keys.TILES.entries)
    for tile in sorted(TILES):
        yield range_of_entries(entries, tile, OPERATION, "GPU, range of entries")


def _slots(kind: type[Slots], size: int) -> Proof:
    proof = Proof(OPERATION, f"GPU, slots of tiles of {size}")
    chosen = proof.integer("chosen", 1, TOKENS)
    see = kind(size, chosen)
    tile = proof.integer("tile", 0, TOKENS // size - 1)
    first = proof.integer("first", 0, chosen)
    place = proof.integer("place", 0, size - 1)
    read = see.slot(first, place)
    proof.state("slots that are read exist", (read >= 0) & (read < chosen))
    slot, entry = proof.integer("slot", 0, chosen - 1), proof.integer("entry", -1, TOKENS - 1)
    start = tile * size
    # What the binary search returns, with -1 behind all: entries ascend, no two are the same.
    proof.assume((slot < first).implies((entry >= 0) & (entry < start)))
    proof.assume((slot >= first).implies((entry < 0) | (entry >= start + slot - first)))
    of_tile = (entry >= start) & (entry < start + size)
    proof.state("a slot of the tile is read", of_tile.implies(
        (slot >= first) & (slot - first < size) & (see.slot(first, slot - first) == slot)
        & see.own(tile, first, slot - first, entry)
    ))
    own = see.own(tile, first, place, entry)
    proof.state("and what is taken is of the tile", own.implies(of_tile))
    proof.state("from no slot twice", (own & (read == slot)).implies(place == slot - first))
    return proof
