"""What is proved of the blocks of routed experts.

Taken for granted is what `plan.make_plan` lays out: an expert's blocks begin where those of the
expert before it end, and the experts of visits never fall. Sums over all experts are proved by
induction: a bound that holds before an expert holds after it.
"""

from __future__ import annotations

from collections.abc import Iterator

from pallas_kernels.codes import BYTES
from pallas_kernels.index_math import maximum, where
from pallas_kernels.moe.index import Grouped, Packed
from pallas_kernels.prove import Proof, Symbol

SIZES = (16, 32, 64, 128)  # rows of a block
DEPTHS = (16, 32, 64)  # rows in a step of a weight's gradient on GPU
TILES = ((1, 1), (3, 2), (32, 16), (16, 32), (56, 24), (24, 56))  # of weights: others, Flash, Pro
MOST_SLOTS, MOST_EXPERTS, MOST_TOKENS = 2**23, 512, 2**20


def proofs(kind: type[Grouped] = Grouped) -> Iterator[Proof]:
    """Yield what is to be proved, of the index functions of `kind`."""
    for size in SIZES:
        yield _plan(kind(size))
        yield _steps(kind(size))
        yield _held_blocks(kind(size))
    for tiles in TILES:
        yield _programs(kind(SIZES[0]), *tiles)
    yield _tokens(kind(SIZES[0]))
    yield _visits(kind(SIZES[0]))
    yield _packed()


def _plan(grouped: Grouped) -> Proof:
    """Every row has a place, whatever the choices."""
    size = grouped.size
    proof = Proof("moe", f"plan of blocks of {size}")
    slots = proof.integer("slots", 1, MOST_SLOTS)
    experts = proof.integer("experts", 1, MOST_EXPERTS)
    before = proof.integer("experts before", 0, experts - 1)
    rows = proof.integer("rows of these", 0, slots)
    first = proof.integer("blocks of these", 0, MOST_SLOTS)
    visits = proof.integer("visits of these", 0, MOST_SLOTS + MOST_EXPERTS)
    own = proof.integer("rows", 0, slots - rows)
    rank = proof.integer("rank of a row", 0, MOST_SLOTS)

    def bounded(rows, first, visits, experts):
        by_blocks = (first * size <= rows + experts * (size - 1)) & (first <= rows)
        return by_blocks & (visits * size <= rows + experts * size)

    proof.assume(bounded(rows, first, visits, before))
    proof.assume(rank < own)
    blocks = grouped.blocks(own)
    end, visited = first + blocks, visits + maximum(blocks, 1)
    proof.state("a bound on blocks holds on", bounded(rows + own, end, visited, before + 1))
    most = grouped.most_blocks(slots, experts)
    proof.state("there are blocks enough", end <= most)
    proof.state("there are visits enough", visited <= grouped.most_visits(slots, experts))
    row = grouped.row(first, rank)
    within = (row >= grouped.row(first)) & (row < grouped.row(end))
    proof.state("a row lies in a block of its expert", within)
    proof.state("rows are in bounds", row < grouped.row(most))
    return proof


def _tokens(grouped: Grouped) -> Proof:
    """Loads through indices."""
    proof = Proof("moe", "tokens of rows")
    tokens = proof.integer("tokens", 1, MOST_TOKENS)
    found = proof.integer("found", 0, tokens)
    index, counts = grouped.token(found, tokens)
    proof.state("a load is in bounds", (index >= 0) & (index < tokens))
    proof.state("what counts is the token that was found", counts.implies(index == found))
    proof.state("all tokens count, and nobody does not", counts.same_as(found != tokens))
    return proof


def _programs(grouped: Grouped, down: int, across: int) -> Proof:
    """The programs of a GPU."""
    proof = Proof("moe", f"programs for {down} x {across} tiles")
    blocks = proof.integer("blocks", 1, grouped.most_blocks(MOST_SLOTS, MOST_EXPERTS))
    number = proof.integer("program", 0, blocks * across - 1)
    block, tile = grouped.program(number, across)
    inside = (block >= 0) & (block < blocks) & (tile >= 0) & (tile < across)
    proof.state("a program has a block and a tile", inside)
    at = proof.integer("block", 0, blocks - 1), proof.integer("tile", 0, across - 1)
    found = grouped.program(at[0] * across + at[1], across)
    proof.state("every tile of a block has a program", (found[0] == at[0]) & (found[1] == at[1]))
    other = grouped.program(proof.integer("program'", 0, blocks * across - 1), across)
    same = (block == other[0]) & (tile == other[1])
    proof.state("no two programs share one", same.implies(block * across + tile == number))
    experts = proof.integer("experts", 1, MOST_EXPERTS)
    number = proof.integer("program of weights", 0, experts * (down * across) - 1)
    expert, i, j = grouped.square(number, down, across)
    inside = (expert >= 0) & (expert < experts) & (i >= 0) & (i < down) & (j >= 0) & (j < across)
    proof.state("a program has a tile of an expert's weights", inside)
    proof.state("no two share it", (expert * down + i) * across + j == number)
    at = (proof.integer("expert", 0, experts - 1), proof.integer("i", 0, down - 1),
          proof.integer("j", 0, across - 1))  # fmt: skip
    found = grouped.square((at[0] * down + at[1]) * across + at[2], down, across)
    same = (found[0] == at[0]) & (found[1] == at[1]) & (found[2] == at[2])
    proof.state("every tile of the weights has a program", same)
    return proof


def _steps(grouped: Grouped) -> Proof:
    """The loop over an expert's rows."""
    proof = Proof("moe", f"steps through blocks of {grouped.size}")
    blocks = proof.integer("blocks", 1, grouped.most_blocks(MOST_SLOTS, MOST_EXPERTS))
    first = proof.integer("first", 0, blocks)
    end = proof.integer("end", first, blocks)
    for depth in (depth for depth in DEPTHS if depth <= grouped.size):
        start, stop = grouped.steps(first, end, depth)
        step = proof.integer(f"step of {depth}", 0, MOST_SLOTS)
        in_loop = (step >= start) & (step < stop)
        row = proof.integer(f"row of {depth}", 0, depth - 1) + step * depth
        inside = (row >= grouped.row(first)) & (row < grouped.row(end))
        proof.state(f"steps of {depth} stay in the expert's rows", in_loop.implies(inside))
        whole = (stop - start) * depth == grouped.row(end) - grouped.row(first)
        proof.state(f"steps of {depth} cover them", whole)
    return proof


class _Read:
    """An array of a plan, of which one number is read."""

    def __init__(self, proof: Proof, name: str, length: Symbol, most: Symbol):
        self._proof, self._name, self._length = proof, name, length
        self.value = proof.integer(name, 0, most)

    def __getitem__(self, index: Symbol | int) -> Symbol:
        inside = (self._length > index) & (self._length - index <= self._length)
        self._proof.state(f"{self._name} is read in bounds", inside)
        return self.value


def _held_blocks(grouped: Grouped) -> Proof:
    """The steps of a TPU's grid over blocks."""
    proof = Proof("moe", f"blocks of {grouped.size} held")
    most = grouped.most_blocks(MOST_SLOTS, MOST_EXPERTS)
    blocks, tiles = proof.integer("blocks", 1, most), proof.integer("tiles", 1, 2**10)
    experts = proof.integer("experts", 1, MOST_EXPERTS)
    block, tile = proof.integer("block", 0, blocks - 1), proof.integer("tile", 0, tiles - 1)
    owner = _Read(proof, "owner", blocks, experts - 1)
    used = (proof.integer("used", 0, blocks),)
    live = grouped.live(block, used[0])
    proof.state("a held block is in bounds", (live >= 0) & (live < blocks))
    proof.state("a block in use is held at its step", (block < used[0]).implies(live == block))
    idle = (block >= used[0]) & (used[0] > 0)
    proof.state("after these the last stays", idle.implies(live == used[0] - 1))
    found = grouped.rows_at(tile, block, owner, used)
    proof.state("rows", (found[0] == live) & (found[1] == 0))
    found = grouped.tile_at(tile, block, owner, used)
    proof.state("a tile of rows", (found[0] == live) & (found[1] == tile))
    found = grouped.part_at(tile, block, owner, used)
    proof.state("sums", (found[0] == tile) & (found[1] == live) & (found[2] == 0))
    found = grouped.columns_at(tile, block, owner, used)
    proof.state("weights", (found[0] == owner.value) & (found[1] == 0) & (found[2] == tile))
    found = grouped.turned_at(tile, block, owner, used)
    proof.state("turned weights", (found[0] == owner.value) & (found[1] == tile) & (found[2] == 0))
    _ = grouped.row(blocks)  # all rows: counted, so held by int32
    return proof


class _Neighbours:
    """The experts of a visit, of the one before and of the one after."""

    def __init__(self, proof: Proof, visit: Symbol, suffix: str, experts: Symbol):
        self.visit = visit
        self.before = proof.integer(f"expert before{suffix}", 0, experts - 1)
        self.here = proof.integer(f"expert{suffix}", self.before, experts - 1)
        self.after = proof.integer(f"expert after{suffix}", self.here, experts - 1)

    def __getitem__(self, index: Symbol) -> Symbol:
        upto = where(index > self.visit, self.after, self.here)
        return where(index < self.visit, self.before, upto)


def _visits(grouped: Grouped) -> Proof:
    """The visits that sum the gradient of weights on a TPU."""
    proof = Proof("moe", "visits")
    experts = proof.integer("experts", 1, MOST_EXPERTS)
    visits = proof.integer("visits", 1, grouped.most_visits(MOST_SLOTS, MOST_EXPERTS))
    visit = proof.integer("visit", 0, visits - 1)
    later = proof.integer("later visit", 0, visits - 1)
    one = _Neighbours(proof, visit, "", experts)
    other = _Neighbours(proof, later, "'", experts)
    proof.assume((later > visit).implies(one.here <= other.before))
    next_one = later == visit + 1
    proof.assume(next_one.implies((one.after == other.here) & (one.here == other.before)))
    twice = (later > visit) & (one.here == other.here)
    starts, ends = grouped.first(later, other), grouped.last(visit, visits, one)
    proof.state("an expert's sum begins once", twice.implies(~starts))
    next_starts = next_one.implies(ends.same_as(starts))
    proof.state("it is written before the next begins, and only then", next_starts)
    proof.state("the first visit begins one", (visit == 0).implies(grouped.first(visit, one)))
    proof.state("the last writes", (visit == visits - 1).implies(grouped.last(visit, visits, one)))
    block, blocks = proof.integer("block", 0, MOST_SLOTS), proof.integer("blocks", 1, MOST_SLOTS)
    tile = proof.integer("down", 0, 2**10), proof.integer("across", 0, 2**10)
    arrays = _Read(proof, "read expert", visits, experts - 1), _Read(
        proof, "read block", visits, blocks - 1
    )
    left = grouped.left_at(*tile, visit, *arrays, None)
    right = grouped.right_at(*tile, visit, *arrays, None)
    same = (left[0] == right[0]) & (left[1] == tile[0]) & (right[1] == tile[1])
    proof.state("both factors are of one block", same)
    found = grouped.weights_at(*tile, visit, *arrays, None)
    own = (found[0] == arrays[0].value) & (found[1] == tile[0]) & (found[2] == tile[1])
    proof.state("the tile written is that of the factors' columns", own)
    used = proof.integer("used", block + 1, MOST_SLOTS + 1)
    proof.state("a filled visit holds its block", grouped.live(block, used) == block)
    return proof


def _packed() -> Proof:
    """The bytes of FP4 codes that a step of a GPU's program loads."""
    proof = Proof("moe", "FP4 codes")
    for depth in DEPTHS:
        steps = proof.integer(f"steps of {depth}", 1, 2**12)
        step = proof.integer(f"step of {depth}", 0, steps - 1)
        byte = step * depth + proof.integer(f"byte of {depth}", 0, depth - 1)
        row = Packed(steps * depth, BYTES)
        scale, odd = row.scale(byte), row.odd(byte)
        proof.state(f"steps of {depth} stay in a row", (byte >= 0) & (byte < row.inner))
        has_scale = (scale >= 0) & (scale * BYTES + BYTES <= row.inner)
        proof.state(f"scales of steps of {depth}, too", has_scale)
        inside = (odd >= row.inner) & (odd < row.inner * 2)
        proof.state(f"their odd columns ({depth}) lie in the second half", inside)
    return proof
