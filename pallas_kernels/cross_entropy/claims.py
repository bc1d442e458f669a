"""What is proved of the tiles of logits."""

from __future__ import annotations

from collections.abc import Iterator

from pallas_kernels.cross_entropy import gpu, tpu
from pallas_kernels.cross_entropy.index import LANES, LogitGrid, Tile
from pallas_kernels.index_math import cdiv
from pallas_kernels.prove import GRID_LIMIT, Proof

LARGEST_TOKENS = 2**20
LARGEST_VOCABULARY = 2**18


def proofs(kind: type[LogitGrid] = LogitGrid) -> Iterator[Proof]:
    """Yield what is to be proved, of the index functions of `kind`."""
    tiles = {tiles.tile for tiles in gpu.TILES.values()}
    for tile in sorted(tiles):
        yield _tiles(kind, "GPU", tile)
    # The fewest rows have the most tiles.
    for rows in (tpu.SMALLEST, tpu.TILE.rows):
        yield _lanes(kind, tpu.TILE._replace(rows=rows))


def _symbols(kind: type[LogitGrid], proof: Proof, tile: Tile):
    blocks = proof.integer("blocks", 1, LARGEST_TOKENS // tile.rows)
    logits = kind(blocks * tile.rows, proof.integer("v", 1, LARGEST_VOCABULARY), tile)
    rows, columns = logits.grid
    return logits, proof.integer("i", 0, rows - 1), proof.integer("j", 0, columns - 1)


def _tiles(kind: type[LogitGrid], platform: str, tile: Tile) -> Proof:
    """State what holds wherever tiles are: that they cover the logits, and each once."""
    proof = Proof("cross_entropy", f"{platform}, tiles of {tile.rows} x {tile.columns}")
    logits, i, j = _symbols(kind, proof, tile)
    rows, columns = logits.grid
    proof.state("tiles of tokens are whole and cover them", rows * tile.rows == logits.tokens)
    row, _ = logits.hidden(i, j)
    _, column = logits.head(i, j)
    own_row, own_column = logits.logits(i, j)
    proof.state("a tile's factors are its rows and columns", (row == i) & (column == j))
    proof.state("a tile is written to its place", (own_row == i) & (own_column == j))
    (token,), (column_token, zero) = logits.each_token(i, j), logits.column_of_tokens(i, j)
    proof.state(
        "what is known of tokens is that of the tile's",
        (token == i) & (column_token == i) & (zero == 0),
    )
    first, second = logits.tile_major(i, j)
    proof.state("a tile's findings have a place of their own", (first == j) & (second == i))
    c = proof.integer("c", 0, tile.columns - 1)
    ids = logits.column(j, c)
    proof.state(
        "the mask leaves what is in bounds", logits.exists(j, c).same_as(ids < logits.vocabulary)
    )
    proof.state("every tile has an id", logits.exists(j, 0))
    target = proof.integer("target", 0, logits.vocabulary - 1)
    own = target // tile.columns
    place = logits.place(own, target)
    proof.state(
        "every id has a tile and a column in it",
        (own < columns) & logits.has(own, target) & logits.exists(own, place)
        & (place >= 0) & (place < tile.columns) & (logits.column(own, place) == target),
    )
    proof.state("no other tile has it", logits.has(j, target).same_as(j == own))
    proof.state(
        "a column is the target's exactly if it has its id",
        (c == logits.place(j, target)).same_as(ids == target),
    )
    proof.state("the grid is one that CUDA takes", columns <= GRID_LIMIT)
    return proof


def _lanes(kind: type[LogitGrid], tile: Tile) -> Proof:
    """State besides that tiles of ids have lanes of their own in blocks that steps share."""
    proof = _tiles(kind, "TPU", tile)
    logits = kind(tile.rows, proof.integer("ids", 1, LARGEST_VOCABULARY), tile)
    columns = logits.grid[1]
    here, later = (proof.integer(name, 0, columns - 1) for name in ("here", "later"))
    (_, block), (_, other) = logits.lanes(0, here), logits.lanes(0, later)
    lane, other_lane = logits.lane(here), logits.lane(later)
    proof.state("a lane is one of a register", (lane >= 0) & (lane < LANES))
    proof.state("a block of lanes is there", (block >= 0) & (block < cdiv(columns, LANES)))
    same = (block == other) & (lane == other_lane)
    proof.state("no two tiles share a lane", same.implies(here == later))
    proof.state("a lane is the tile's own column", block * LANES + lane == here)
    proof.state(
        "steps that share a block follow each other", (here < later).implies(block <= other)
    )
    return proof
