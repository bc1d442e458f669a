"""What is proved of the rows that entries are made of."""

from __future__ import annotations

from collections.abc import Iterator

from pallas_kernels.compressor.index import SUBLANES, Block, Rows, parts
from pallas_kernels.compressor.tpu_fitted import ENTRIES
from pallas_kernels.index_math import where
from pallas_kernels.prove import Proof

LARGEST_TOKENS = 2**20
BLOCKS = ((4, 2), (128, 1))  # ratio and series of released models
WIDTHS = 512, 128
ANGLES = 32
RATIOS = 4, 128, 6  # on TPU; the last does not divide a register's rows


def proofs(kind: type[Block] = Block, rows: type[Rows] = Rows) -> Iterator[Proof]:
    """Yield what is to be proved, of the index functions of these kinds."""
    for ratio, series in BLOCKS:
        yield _rows(kind(ratio, series))
    for width in WIDTHS:
        yield _channels(width)
    for ratio in RATIOS:
        for entries in ENTRIES:
            yield _steps(rows(ratio, entries))


def _channels(width: int) -> Proof:
    proof = Proof("compressor", f"GPU: channels of width {width}")
    plain, first, second = parts(width, ANGLES)
    channel = proof.integer("channel", 0, width - 1)
    place = proof.integer("place", 0, 2 * width)  # also of those that fill an array up
    for name, part in (("plain", plain), ("first", first), ("second", second)):
        at = part.at(place)
        proof.state(f"{name} ones are there", part.there(place).implies((at >= 0) & (at < width)))
    rotated = width - 2 * ANGLES
    pair = where(channel < rotated, 0, channel - rotated) // 2
    proof.state(
        "every channel has its place in one part",
        ((channel < rotated) & plain.there(channel)).implies(plain.at(channel) == channel)
        & (channel >= rotated).implies(
            first.there(pair) & ((channel == first.at(pair)) | (channel == second.at(pair)))
            & ~plain.there(channel)
        ),
    )
    proof.state(
        "the two of a pair are neighbours", first.at(place) + 1 == second.at(place)
    )
    return proof


def _steps(rows: Rows) -> Proof:
    proof = Proof("compressor", f"TPU: {rows.entries} entries of {rows.ratio} tokens a step")
    most = LARGEST_TOKENS // rows.tokens + 1
    blocks = proof.integer("blocks", 1, most)
    step, other = (proof.integer(f"step{i}", 0, blocks - 1) for i in ("", "'"))
    size = rows.tokens_before
    proof.state(
        "pieces of tokens before are whole tiles, and hold a block",
        (blocks * size % SUBLANES == 0) & (blocks * 0 + size >= rows.ratio),
    )
    before = rows.before(step)
    proof.state(
        "tokens before are there", (before >= 0) & ((before + 1) * size <= blocks * rows.tokens)
    )
    proof.state(
        "they end where a step's tokens begin",
        (step > 0).implies((before + 1) * size == step * rows.tokens),
    )
    block = rows.from_last(step, blocks)
    proof.state("every block is there", (block >= 0) & (block < blocks))
    proof.state(
        "no block is written twice", (block == rows.from_last(other, blocks)).implies(step == other)
    )
    proof.state(
        "a step is followed by the block before",
        (step < blocks - 1).implies(rows.from_last(step + 1, blocks) == block - 1),
    )
    return proof


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
    past = proof.integer("past", block.slots, 2 * block.slots)
    proof.state("no slot past the last is used", ~block.used(past, previous))
    proof.state("a slot has a bias", (bias >= 0) & (bias < ratio * series))
    proof.state("of its own", (bias == bias_too).implies(slot == slot_too))
    return proof
