"""What is proved of the entries that the indexer's programs score."""

from __future__ import annotations

from collections.abc import Iterator

from pallas_kernels.codes import BYTES
from pallas_kernels.index_math import div
from pallas_kernels.indexer import gpu, gpu_stored, tpu, tpu_stored
from pallas_kernels.indexer.index import Merge, Packed, Programs, Rounds, Steps, Tiled
from pallas_kernels.prove import Proof
from pallas_kernels.sparse_attention.index import Split, first_block, last_block

OPERATION = "indexer"
TOKENS = 2**20  # in a row, at most
ENTRIES = TOKENS // 4
TOPK = (16, 64, 512, 1024)


def proofs(
    rounds: type[Rounds] = Rounds, programs: type[Programs] = Programs, steps: type[Steps] = Steps,
    split: type[Split] = Split, merge: type[Merge] = Merge, packed: type[Packed] = Packed,
    tiled: type[Tiled] = Tiled,
) -> Iterator[Proof]:
    """Yield what is to be proved, of the index functions of these kinds."""
    for topk in TOPK:
        lengths = (1, *(2**n for n in range(topk.bit_length(), ENTRIES.bit_length())))
        for kind in sorted({gpu.rounds_for(topk, entries) for entries in lengths}):
            yield _rounds(rounds(*kind))
    for count in sorted({max(gpu.PROGRAMS // rows, 1) for rows in range(1, gpu.PROGRAMS + 1)}):
        yield _programs(programs, count)
    for parts in sorted({gpu_stored.parts_for(n, ENTRIES, 1) for n in range(1, gpu.PROGRAMS + 1)}):
        yield _parts(split(parts))
        for length in (16, 1024):
            yield _merge(merge(parts, gpu_stored.merged_at_once(parts, length)), length)
    for channels in (32, 128):
        yield _packed(packed(channels // 2 // BYTES, BYTES))
    yield _steps(steps, tpu.ENTRIES)
    yield _steps(steps, tpu_stored.TILED.block)
    yield _tiled(tiled(*tpu_stored.TILED))


def _rounds(rounds: Rounds) -> Proof:
    proof = Proof(OPERATION, f"GPU, best {rounds.topk}, {rounds.slots} slots")
    count = proof.integer("entries", 1, ENTRIES)
    first = proof.integer("first", 0, count)
    end = proof.integer("end", first, count)
    number = proof.integer("round", 0, rounds.count(first, end) - 1)
    tile = proof.integer("tile", 0, rounds.tiles(first, end, number) - 1)
    slot = rounds.slot(tile, proof.integer("place", 0, rounds.tile - 1))
    entry = rounds.entry(first, number, slot)
    row, exists = rounds.row(entry, end), rounds.exists(first, end, number, slot)
    proof.state("slots exist and are not those of the best",
                (slot >= rounds.topk) & (slot < rounds.slots))
    proof.state("rows exist", (row >= 0) & (row < count))
    proof.state("what exists is read, and of the range",
                exists.implies((row == entry) & (entry >= first) & (entry < end)))
    some = proof.integer("some slot", 0, rounds.slots - 1)
    scored = (some >= rounds.topk) & (
        some < rounds.slot(rounds.tiles(first, end, number), 0)
    )
    proof.state("what exists is scored", rounds.exists(first, end, number, some).implies(scored))
    wanted = proof.integer("entry", 0, count - 1)
    of = div(wanted - first, rounds.new)
    proof.assume(wanted >= first)
    own = wanted - first - of * rounds.new + rounds.topk
    proof.state("an entry of the range has a round and a slot", (wanted < end).implies(
        (of >= 0) & (of < rounds.count(first, end)) & (own < rounds.slots)
        & rounds.exists(first, end, of, own) & (rounds.entry(first, of, own) == wanted)
    ))
    other = proof.integer("round'", 0, rounds.count(first, end) - 1)
    proof.state("and no other", (rounds.entry(first, other, some) == wanted).implies(
        (some < rounds.topk) | ((other == of) & (some == own))
    ))
    return proof


def _programs(kind: type[Programs], count: int) -> Proof:
    proof = Proof(OPERATION, f"GPU, queries of a row shared by {count} programs")
    tokens = proof.integer("tokens", 1, TOKENS)
    share = kind(tokens, count)
    program = proof.integer("program", 0, count - 1)
    n = proof.integer("n", 0, share.length(program) - 1)
    token = share.token(program, n)
    proof.state("queries exist", (token >= 0) & (token < tokens))
    other = proof.integer("program'", 0, count - 1)
    m = proof.integer("m", 0, share.length(other) - 1)
    proof.state("no query has two programs", (share.token(other, m) == token).implies(
        (program == other) & (n == m)
    ))
    number = proof.integer("number", 0, tokens - 1)
    turn = div(number, count)
    own = number - turn * count
    proof.state("every query has one", (turn < share.length(own)) & (
        share.token(own, turn) == number
    ))
    return proof


def _parts(split: Split) -> Proof:
    proof = Proof(OPERATION, f"GPU, entries of a cache in {split.parts} parts")
    end = proof.integer("end", 0, ENTRIES)
    part = proof.integer("part", 0, split.parts - 1)
    first, last = split.piece(0, end, part)
    proof.state("parts are ranges of what is seen", (first >= 0) & (first <= last) & (last <= end))
    entry = proof.integer("entry", 0, ENTRIES - 1)
    other = proof.integer("part'", 0, split.parts - 1)
    there = split.piece(0, end, other)
    within, later = (entry >= first) & (entry < last), part < other
    proof.state("no entry has two parts", (within & (entry >= there[0]) & (entry < there[1]))
                .implies(part == other))
    proof.state("numbers of later parts are higher", (later & within).implies(
        (entry < there[0]) | (there[0] == there[1])
    ))
    following = split.piece(0, end, part + 1)
    proof.state("parts follow each other", following[0] == last)
    proof.state("and are all", split.piece(0, end, split.parts - 1)[1] == end)
    return proof


def _merge(merge: Merge, length: int) -> Proof:
    proof = Proof(OPERATION, f"GPU, the best {length} of {merge.parts} parts, {merge.size} at once")
    group = proof.integer("group", 0, merge.groups - 1)
    part = proof.integer("part", 0, merge.parts - 1)
    first = group * merge.size
    proof.state("parts of a group exist", first + merge.size <= merge.parts)
    proof.state("every part has a group", div(part, merge.size) < merge.groups)
    return proof


def _packed(packed: Packed) -> Proof:
    proof = Proof(OPERATION, f"GPU, packed keys of {packed.groups} groups")
    codes, width = packed.groups * packed.size, packed.groups * (packed.size + 1)
    group = proof.integer("group", 0, packed.groups - 1)
    place = proof.integer("place", 0, packed.size - 1)
    code, scale = packed.code(group, place), packed.scale(group)
    proof.state("codes are codes", (code >= 0) & (code < codes))
    proof.state("scales are scales", (scale >= codes) & (scale < width))
    byte = proof.integer("byte", 0, codes - 1)
    own = div(byte, packed.size)
    proof.state("every code is read", packed.code(own, byte - own * packed.size) == byte)
    proof.state("by its group", (code == byte).implies(group == own))
    return proof


def _steps(kind: type[Steps], size: int) -> Proof:
    proof = Proof(OPERATION, f"TPU, blocks of {size} entries")
    steps = kind(size, proof.integer("blocks", 1, ENTRIES // size))
    first = proof.integer("first", 0, steps.count - 1)
    last = proof.integer("last", first, steps.count - 1)
    step = proof.integer("step", 0, steps.count - 1)
    read = steps.read(step, first, last)
    proof.state("blocks exist", (read >= 0) & (read < steps.count))
    proof.state("a wanted block is read", steps.wanted(step, first, last).implies(read == step))
    entries = steps.count * size
    least, most = proof.integer("least first", 0, entries), proof.integer("end", 0, entries)
    first, last = first_block(least, most, size), last_block(most, size)
    entry = proof.integer("entry", 0, entries - 1)
    own = div(entry, size)
    has_step = steps.wanted(own, first, last) & (own < steps.count)
    seen = (least <= entry) & (entry < most)
    proof.state("an entry that a query sees has a step", seen.implies(has_step))
    return proof


def _tiled(tiled: Tiled) -> Proof:
    proof = Proof(OPERATION, "TPU, entries of a cache in rows of lanes")
    blocks = proof.integer("blocks", 1, tpu_stored.MOST_ENTRIES // tiled.block)
    rows, lanes = tiled.rows(blocks), tiled.lanes
    last = proof.integer("last block", 0, blocks - 1)
    step = proof.integer("step", 0, last)
    tile = proof.integer("tile", 0, tiled.block // tiled.tile - 1)
    of_tile = proof.integer("row of a tile", 0, tiled.tile // lanes - 1)
    lane = proof.integer("lane", 0, lanes - 1)
    row = tiled.row(step, tile) + of_tile
    proof.state("rows exist", (row >= 0) & (row < rows))
    chunks = tiled.chunks(last)
    proof.state("chunks exist", (chunks >= 1) & (chunks * lanes <= rows))
    chunk = div(row, lanes)
    proof.state("what is scored is in a chunk", chunk < chunks)
    proof.state("a place has the number that was scored there", tiled.number(
        chunk, row - chunk * lanes, lane
    ) == tiled.entry(step, tile) + of_tile * lanes + lane)
    entry = proof.integer("entry", 0, (last + 1) * tiled.block - 1)
    block = div(entry, tiled.block)
    own = div(entry - block * tiled.block, tiled.tile)
    proof.state("an entry of these blocks has a tile", (block <= last) & (
        tiled.entry(block, own) <= entry) & (entry < tiled.entry(block, own) + tiled.tile
    ))
    return proof
