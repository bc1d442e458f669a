"""What is proved of the stored rows that programs of cached attention read and see.

The definition: the query at a place of a call that begins at `start` sees the keys at positions
start + place - slots + 1 to start + place, and entries before `end`. The ring has the keys of the
`slots` positions before `start`, each at its position modulo `slots`.
"""

from __future__ import annotations

from collections.abc import Iterator

from pallas_kernels.cached_attention import gpu, tpu
from pallas_kernels.cached_attention.formats import Form, parts_of
from pallas_kernels.cached_attention.index import (
    Column,
    Ring,
    Split,
    Steps,
    Tiles,
    sees_new,
)
from pallas_kernels.index_math import div, mod
from pallas_kernels.prove import Proof

OPERATION = "cached_attention"
TOKENS = 2**20  # in a row, at most
SLOTS = (8, 128, 4096)  # of a ring
MOST_TOKENS = 8  # of a call
TILES = (gpu.TUNING.keys,)
PARTS = (2, 9, gpu.INVARIANT_PARTS, gpu.PROGRAMS)
FORM = Form(512, 64, True)  # of V4
WIDE = 2**32  # bytes: places in larger arrays have 64 bits


def proofs(
    ring: type[Ring] = Ring, tiles: type[Tiles] = Tiles, split: type[Split] = Split,
    column: type[Column] = Column, steps: type[Steps] = Steps,
) -> Iterator[Proof]:
    """Yield what is to be proved, of the index functions of these kinds."""
    for slots in SLOTS:
        yield _ring(ring, slots)
        for tile in TILES:
            yield _tiles(tiles, tile, slots)
    for parts in PARTS:
        yield _pieces(split, parts, gpu.LEAST)
    yield _columns(column)
    yield _offsets()
    yield _steps(steps)


def _ring(kind: type[Ring], slots: int) -> Proof:
    proof = Proof(OPERATION, f"ring of {slots} slots")
    start = proof.integer("start", 0, TOKENS)
    place, token = (proof.integer(x, 0, MOST_TOKENS - 1) for x in ("place", "token"))
    slot = proof.integer("slot", 0, slots - 1)
    ring = kind(slots)
    position = ring.position(slot, start)
    proof.state("a slot has one of the last positions",
                (position >= start - slots) & (position < start))
    proof.state("it is its position modulo the slots",
                (position >= 0).implies(mod(position + slots, slots) == slot))
    shown = (position >= 0) & (position > start + place - slots) & (position <= start + place)
    proof.state("the mask is the definition", ring.sees(place, slot, start).same_as(shown))
    at = start + token
    inside = (at > start + place - slots) & (at <= start + place)
    proof.state("and that of new tokens", sees_new(place, token).same_as(inside))
    return proof


def _tiles(kind: type[Tiles], tile: int, slots: int) -> Proof:
    proof = Proof(OPERATION, f"GPU, tiles of {tile}, ring of {slots} slots")
    count = proof.integer("entries", 1, TOKENS)
    end = proof.integer("end", 0, count)
    tiles = kind(tile, slots)
    total = tiles.count(end)
    first = proof.integer("first", 0, total)
    last = proof.integer("last", first, total)
    number = proof.integer("tile", 0, total - 1)
    here = (first <= number) & (number < last)
    before = tiles.ring_tiles
    ranges = {
        "the ring's": (tiles.ring(first, last), number, number < before),
        "new tokens'": (tiles.new(first, last), number - before, number == before),
        "entries'": (tiles.entries(first, last), number - before - 1, number > before),
    }
    for name, ((begin, stop), own, is_kind) in ranges.items():
        proof.state(f"a piece's tiles are {name} where they are",
                    is_kind.implies(((begin <= own) & (own < stop)).same_as(here)))
        some = proof.integer(f"some of {name}", -2 - before, total)
        within = (begin <= some) & (some < stop)
        kept = {"the ring's": some < before, "new tokens'": some == 0}.get(
            name, tiles.key(some, 0) < end
        )
        proof.state(f"there are no more of {name}", within.implies((some >= 0) & kept))
    slot = proof.integer("slot", 0, slots - 1)
    proof.state("every slot has a tile", div(slot, tile) < before)
    entry = proof.integer("entry", 0, count - 1)
    proof.state("every entry before the end, too",
                (entry < end).implies(before + 1 + div(entry, tile) < total))
    own, place = proof.integer("own", 0, TOKENS // tile), proof.integer("place", 0, tile - 1)
    key = tiles.key(own, place)
    row = tiles.row(key, end)
    proof.state("rows exist", (row >= 0) & (row < count))
    proof.state("what is seen is what is read", (key < end).implies(row == key))
    proof.state("a key is at its place of its tile",
                (div(key, tile) == own) & (mod(key, tile) == place))
    return proof


def _pieces(kind: type[Split], parts: int, least: int) -> Proof:
    proof = Proof(OPERATION, f"GPU, {parts} pieces of at least {least} tiles")
    tiles = proof.integer("tiles", 1, TOKENS)
    part = proof.integer("part", 0, parts - 1)
    split = kind(parts, least)
    first, last = split.piece(tiles, part)
    proof.state("pieces are of tiles that exist", (0 <= first) & (first <= last) & (last <= tiles))
    proof.state("the first begins at the first tile", split.piece(tiles, 0)[0] == 0)
    proof.state("each begins where the one before ends",
                (part > 0).implies(split.piece(tiles, part - 1)[1] == first))
    proof.state("the last ends at the last tile", split.piece(tiles, parts - 1)[1] == tiles)
    proof.state("what is added up has tiles", split.used(tiles, part).same_as(first < last))
    other = proof.integer("part'", 0, parts - 1)
    proof.state("and what comes before it, too", ((other < part) & split.used(tiles, part)).implies(
        split.used(tiles, other)
    ))
    return proof


def _columns(kind: type[Column]) -> Proof:
    proof = Proof(OPERATION, "GPU, columns of a row")
    width = proof.integer("width", 1, TOKENS)
    first = proof.integer("first", 0, width - 1)
    count = proof.integer("count", 1, width - first)
    place = proof.integer("place", 0, TOKENS)
    at = kind(first, count).at(place)
    proof.state("they exist", (at >= 0) & (at < width))
    proof.state("those of the part are read", (place < count).implies(at == first + place))
    return proof


def _offsets() -> Proof:
    """State that 32 bits hold the places in an array of words of served rows."""
    proof = Proof(OPERATION, "GPU, places in arrays of served rows")
    width, parts = FORM.width // 2, parts_of(FORM)
    row = proof.integer("row", 0, WIDE // FORM.width - 1)
    for number, part in enumerate(parts.parts):
        place = proof.integer(f"place {number}", 0, parts.width - 1)
        column = part.columns.at(place)
        place = row * width + column
        proof.state(f"part {number} lies within its row", (column >= 0) & (column < width))
        proof.state(f"place {number} is one", place >= 0)
        if part.scale:
            proof.state(f"scale {number} lies within the row", row * width + part.scale >= 0)
    return proof


def _steps(kind: type[Steps]) -> Proof:
    proof = Proof(OPERATION, "TPU, blocks of entries")
    count = proof.integer("entries", 1, TOKENS)
    end = proof.integer("end", 0, count)
    steps = kind(tpu.ENTRIES)
    blocks = div(count + tpu.ENTRIES - 1, tpu.ENTRIES)
    step = proof.integer("step", 0, blocks)
    read = steps.read(step, end)
    proof.state("blocks that are read exist", (read >= 0) & (read < blocks))
    proof.state("a wanted block is the one that is read",
                steps.wanted(step, end).implies(read == steps.block(step)))
    entry = proof.integer("entry", 0, count - 1)
    own = div(entry, tpu.ENTRIES) + 1
    proof.state("every entry before the end has a step", (entry < end).implies(
        (own <= blocks) & steps.wanted(own, end) & (steps.block(own) == div(entry, tpu.ENTRIES))
    ))
    place = entry - steps.first(own)
    proof.state("at a place of its block", (place >= 0) & (place < tpu.ENTRIES))
    return proof
