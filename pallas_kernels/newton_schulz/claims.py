"""What is proved of the symmetric product's tiles."""

from __future__ import annotations

from collections.abc import Iterator

from pallas_kernels.newton_schulz.index import Triangle
from pallas_kernels.prove import GRID_LIMIT, Proof

LARGEST_TILES = 2**13  # of 16 rows at least: matrices of up to 2^17 rows and columns
LARGEST_BLOCK = 512


def proofs(kind: type[Triangle] = Triangle) -> Iterator[Proof]:
    """Yield what is to be proved, of the index functions of `kind`."""
    proof = Proof("newton_schulz", "symmetric product")
    triangle = kind(proof.integer("tiles", 1, LARGEST_TILES))
    rows, columns = triangle.grid

    def step(suffix: str):
        row = proof.integer(f"row{suffix}", 0, rows - 1)
        return row, proof.integer(f"column{suffix}", 0, columns - 1)

    here, other = step(""), step("'")
    _, i, j = triangle.own(0, *here)
    (_, left, _), (_, right, _) = triangle.left(0, *here), triangle.right(0, *here)
    proof.state("a tile lies in the triangle", (j >= 0) & (j <= i) & (i < triangle.tiles))
    proof.state("its factors are its rows and its columns", (left == i) & (right == j))
    _, i2, j2 = triangle.own(0, *other)
    same_step = (here[0] == other[0]) & (here[1] == other[1])
    proof.state("no two steps share a tile", ((i == i2) & (j == j2)).implies(same_step))
    proof.state(
        "no tile is another's mirror image", ((i == j2) & (j == i2)).implies(same_step)
    )
    i = proof.integer("i", 0, triangle.tiles - 1)
    j = proof.integer("j", 0, i)
    row, column = triangle.place(i, j)
    in_grid = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    _, found_i, found_j = triangle.own(0, row, column)
    proof.state("every tile of the triangle has a step", in_grid & (found_i == i) & (found_j == j))
    proof.state("the grid is one that CUDA takes", (rows <= GRID_LIMIT) & (columns <= GRID_LIMIT))
    _ = (i + 1) * LARGEST_BLOCK  # one past the last row of a tile: computed, so held by int32
    yield proof
