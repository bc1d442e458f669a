"""What is proved of the rows that entries are made of."""

from __future__ import annotations

from collections.abc import Iterator

from pallas_kernels.compressor.index import Block
from pallas_kernels.prove import Proof

LARGEST_TOKENS = 2**20
BLOCKS = ((4, 2), (128, 1))  # ratio and series of released models


def proofs(kind: type[Block] = Block) -> Iterator[Proof]:
    """Yield what is to be proved, of the index functions of `kind`."""
    for ratio, series in BLOCKS:
        yield _rows(kind(ratio, series))


def _rows(block: Block) -> Proof:
    ratio, series = block.ratio, block.series
    proof = Proof("compressor", f"entries of {ratio} tokens, {series} series")
    tokens = proof.integer("tokens", ratio, LARGEST_TOKENS)

    def entry(suffix: str, first):
        start = proof.integer(f"start{suffix}", first, tokens - ratio)
        previous = proof.integer(f"previous{suffix}", 0, 1) == 1
        proof.assume(previous.implies(start >= ratio))  # a block before has its tokens
        return start, previous, proof.integer(f"slot{suffix}", 0, block.slots - 1)

    start, previous, slot = entry("", 0)
    row, used = block.row(start, slot), block.used(slot, previous)
    proof.state("every row is there, used or not", (row >= 0) & (row < tokens * series))
    own = start * series + series - 1  # of the block's first token
    # With one series there is nothing but the own block.
    first_own = block.slots - ratio
    proof.state(
        "own slots are the block's tokens in order, of the last series",
        block.own(slot).implies(used & (row == own + (slot - first_own) * series)),
    )
    proof.state(
        "the others are those of the block before, of the first series",
        (~block.own(slot) & previous).implies(used & (row == (start - ratio + slot) * series)),
    )
    proof.state("no others are used", used.implies(block.own(slot) | previous))
    later, previous_too, slot_too = entry("'", 0)
    used_too, row_too = block.used(slot_too, previous_too), block.row(later, slot_too)
    both = used & used_too & (row == row_too)
    proof.state("no row serves two entries", ~((later >= start + ratio) & both))
    proof.state(
        "no row serves an entry twice",
        ((later == start) & both).implies(slot == slot_too),
    )
    bias, bias_too = block.bias(slot), block.bias(slot_too)
    proof.state("a slot has a bias", (bias >= 0) & (bias < ratio * series))
    proof.state("of its own", (bias == bias_too).implies(slot == slot_too))
    return proof
