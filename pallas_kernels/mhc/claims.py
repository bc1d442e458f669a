"""What is proved of the blocks of tokens, and of the groups of tiles."""

from __future__ import annotations

from collections.abc import Iterator

from pallas_kernels.index_math import cdiv
from pallas_kernels.mhc import gpu, gpu_backward, tpu
from pallas_kernels.mhc.index import Blocks, Groups
from pallas_kernels.prove import GRID_LIMIT, Proof

LARGEST_TOKENS = 2**20
MOST_SLICES = 1024  # of 64 columns: a width of 2^16
BLOCKS = sorted({
    *(tpu.MOST_TOKENS >> i for i in range(4)), gpu.MIX.tokens, gpu.COLLAPSE.tokens,
    gpu_backward.READ.tokens, gpu_backward.GATE_TOKENS,
})  # fmt: skip


def proofs(blocks: type[Blocks] = Blocks, groups: type[Groups] = Groups) -> Iterator[Proof]:
    """Yield what is to be proved, of the index functions of both kinds."""
    for size in BLOCKS:
        yield _blocks(blocks, size)
    largest = gpu_backward.tiles_of_group(LARGEST_TOKENS // gpu_backward.STREAM.tokens)
    per_group = gpu_backward.STREAM.fewest
    while per_group <= largest:
        yield _groups(groups, per_group)
        per_group *= 2


def _blocks(kind: type[Blocks], size: int) -> Proof:
    proof = Proof("mhc", f"blocks of {size} tokens")
    tokens = proof.integer("tokens", 1, LARGEST_TOKENS)
    blocks = kind(cdiv(tokens, size))
    slices = proof.integer("slices", 1, MOST_SLICES)
    i, j = (proof.integer("i", 0, blocks.tokens - 1), proof.integer("j", 0, slices - 1))
    i2, j2 = (proof.integer("i'", 0, blocks.tokens - 1), proof.integer("j'", 0, slices - 1))
    same, same_tokens = (i == i2) & (j == j2), i == i2
    for order, wrap in (("", lambda block: block), (", last first", blocks.reversed)):
        at = [wrap(block) for block in (blocks.rows, blocks.gates, blocks.all_partial)]
        row, column = at[0](i, j)
        in_array = (row >= 0) & (row * size < tokens) & (column >= 0) & (column < slices)
        proof.state(f"a block begins among the tokens and columns{order}", in_array)
        row2, column2 = at[0](i2, j2)
        disjoint = ((row == row2) & (column == column2)).implies(same)
        proof.state(f"no two programs share a block{order}", disjoint)
        found = at[0](row, column)  # the order of blocks is its own inverse
        proof.state(f"every block has a program{order}", (found[0] == i) & (found[1] == j))
        agree = (at[1](i, j)[1] == row) & (at[2](i, j)[2] == row)
        streams = wrap(blocks.streams)(i, j)
        agree &= (streams[0] == row) & (streams[2] == column)
        proof.state(f"gates and streams are those of its tokens{order}", agree)
    slice_, _, block = blocks.partial(i, j)
    slice2, _, block2 = blocks.partial(i2, j2)
    own = ((slice_ == slice2) & (block == block2)).implies(same)
    proof.state("no two programs share partial sums", own & (slice_ == j) & (block == i))
    own = (blocks.own_gates(i)[0] == blocks.own_gates(i2)[0]).implies(same_tokens)
    proof.state("no two blocks share gates", own)
    proof.state("weights are those of its columns", blocks.weights(i, j)[2] == j)
    proof.state("the grid is one that CUDA takes", slices <= GRID_LIMIT)
    _ = (i + 1) * size  # one past the last token: computed, so held by int32
    return proof


def _groups(kind: type[Groups], per_group: int) -> Proof:
    proof = Proof("mhc", f"groups of {per_group} tiles")
    size = gpu_backward.STREAM.tokens
    groups = kind(proof.integer("tiles", 1, LARGEST_TOKENS // size), per_group)
    group = proof.integer("group", 0, groups.count - 1)
    group2 = proof.integer("group'", 0, groups.count - 1)
    k = proof.integer("k", 0, groups.length(group) - 1)
    k2 = proof.integer("k'", 0, groups.length(group2) - 1)
    tile, tile2 = groups.first(group) + k, groups.first(group2) + k2
    proof.state("a tile is one of those there are", (tile >= 0) & (tile < groups.tiles))
    same = (group == group2) & (k == k2)
    proof.state("no tile is taken twice", (tile == tile2).implies(same))
    any_tile = proof.integer("tile", 0, groups.tiles - 1)
    own = any_tile // per_group
    taken = any_tile - groups.first(own)
    in_group = (own >= 0) & (own < groups.count) & (taken >= 0) & (taken < groups.length(own))
    proof.state("every tile is taken", in_group)
    j = proof.integer("slice", 0, MOST_SLICES - 1)
    columns = (groups.streams(j, group)[2] == j) & (groups.rows(j, group)[1] == j)
    columns &= groups.weights(j, group)[2] == j
    proof.state("streams and weights are those of its columns", columns)
    proof.state("partial sums are its own", groups.partial(j, group)[0] == j)
    part, _, column, _ = groups.weight_sums(j, group)
    proof.state("sums of weights' gradients are its own", (part == group) & (column == j))
    proof.state("the grid is one that CUDA takes", groups.count <= GRID_LIMIT)
    _ = (tile + 1) * size  # one past the last token of a tile: computed, so held by int32
    return proof
