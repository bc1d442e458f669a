"""What is proved of the entries that the indexer's programs score."""

from __future__ import annotations

from collections.abc import Iterator

from pallas_kernels.index_math import div
from pallas_kernels.indexer import gpu, tpu
from pallas_kernels.indexer.index import Programs, Rounds, Steps
from pallas_kernels.prove import Proof
from pallas_kernels.sparse_attention.index import first_block, last_block

OPERATION = "indexer"
TOKENS = 2**20  # in a row, at most
ENTRIES = TOKENS // 4
TOPK = (16, 64, 512, 1024)


def proofs(
    rounds: type[Rounds] = Rounds, programs: type[Programs] = Programs, steps: type[Steps] = Steps,
) -> Iterator[Proof]:
    """Yield what is to be proved, of the index functions of these kinds."""
    for topk in TOPK:
        for entries in (1, ENTRIES):
            yield _rounds(rounds(*gpu.rounds_for(topk, entries)))
    yield _programs(programs)
    yield _steps(steps)


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


def _programs(kind: type[Programs]) -> Proof:
    proof = Proof(OPERATION, "GPU, queries shared by programs")
    # Products of two symbols are no matter of the solver's: rows of one length.
    rows, tokens, count = proof.integer("rows", 1, 2**10), 4096, gpu.PROGRAMS
    share = kind(rows, tokens, count)
    program = proof.integer("program", 0, count - 1)
    n = proof.integer("n", 0, share.length(program) - 1)
    row, token = share.query(program, n)
    proof.state("queries exist", (row >= 0) & (row < rows) & (token >= 0) & (token < tokens))
    other = proof.integer("program'", 0, count - 1)
    m = proof.integer("m", 0, share.length(other) - 1)
    there = share.query(other, m)
    proof.state("no query has two programs", ((there[0] == row) & (there[1] == token)).implies(
        (program == other) & (n == m)
    ))
    number = proof.integer("number", 0, rows * tokens - 1)
    turn = div(number, count)
    own = number - turn * count
    found = share.query(own, turn)
    proof.state("every query has one", (turn < share.length(own)) & (
        found[0] * tokens + found[1] == number
    ))
    return proof


def _steps(kind: type[Steps]) -> Proof:
    proof = Proof(OPERATION, "TPU, blocks of entries")
    steps = kind(tpu.ENTRIES, proof.integer("blocks", 1, ENTRIES // tpu.ENTRIES))
    first = proof.integer("first", 0, steps.count - 1)
    last = proof.integer("last", first, steps.count - 1)
    step = proof.integer("step", 0, steps.count - 1)
    read = steps.read(step, first, last)
    proof.state("blocks exist", (read >= 0) & (read < steps.count))
    proof.state("a wanted block is read", steps.wanted(step, first, last).implies(read == step))
    entries = steps.count * tpu.ENTRIES
    least, most = proof.integer("least first", 0, entries), proof.integer("end", 0, entries)
    first, last = first_block(least, most, tpu.ENTRIES), last_block(most, tpu.ENTRIES)
    entry = proof.integer("entry", 0, entries - 1)
    own = div(entry, tpu.ENTRIES)
    has_step = steps.wanted(own, first, last) & (own < steps.count)
    seen = (least <= entry) & (entry < most)
    proof.state("an entry that a query sees has a step", seen.implies(has_step))
    return proof
