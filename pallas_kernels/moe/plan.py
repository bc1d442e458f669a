"""Sort the choices of tokens by expert: which row of which block each of them gets."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.index_math import cdiv
from pallas_kernels.moe.index import Grouped

SMALLEST, LARGEST = 16, 128  # rows of a block
INVARIANT = 64  # where it may not depend on the number of rows
LINE, PART = 128, 2**15  # slots counted by one product, and at a time


@partial(jax.tree_util.register_dataclass, meta_fields=["expected"], data_fields=[
    "source", "token", "place", "owner", "first", "used",
])
@dataclasses.dataclass(frozen=True)
class Plan:
    """Where each slot stands among rows grouped by expert, and whose each block is.

    `source` and `place` are inverse to each other; an index past the end means "nothing".
    """

    source: Int[Array, " rows"]  # slot (token * choices + choice) of each row
    token: Int[Array, " rows"]  # token of each row
    place: Int[Array, "t a"]  # row of each slot
    owner: Int[Array, " blocks"]  # expert of each block; that of the last, for blocks of nobody
    first: Int[Array, " e+1"]  # first block of each expert; the last entry is `used`
    used: Int[Array, " 1"]  # blocks that are somebody's: all before the others
    expected: int  # slots that are probably somebody's: compilers are told that these take time

    def expected_rows(self, size: int) -> int:
        """Return the rows of blocks of this size that are probably computed.

        The last block of an expert is half empty on average.
        """
        count = self.first.size - 1
        return min(self.source.size, self.expected + count * size // 2)


class Visits(NamedTuple):
    """The blocks in order, with one more visit for each expert without; the rest do nothing."""

    expert: Int[Array, " visits"]
    block: Int[Array, " visits"]
    filled: Int[Array, " visits"]  # 1: the block is to be read, 0: nothing is


def block_rows(slots: int, experts: int) -> int:
    """Choose the rows of a block: the largest power of two not above the mean of an expert's.

    The last block of an expert is half empty on average, so large ones suit many rows only.
    """
    mean = max(slots // experts, 1)
    return max(SMALLEST, min(LARGEST, 2 ** (mean.bit_length() - 1)))


def make_plan(
    experts: Int[Array, "t a"], count: int, size: int, expected: int | None = None
) -> Plan:
    """Give every expert whole blocks of `size` rows. An id outside 0...count-1 stands for none.

    Args:
      expected: slots that are probably somebody's; None: all.
    """
    grouped, (tokens, choices) = Grouped(size), experts.shape
    slots = experts.size
    blocks = grouped.most_blocks(slots, count)
    rows = grouped.row(blocks)
    flat = experts.reshape(-1).astype(jnp.int32)
    flat = jnp.where((flat >= 0) & (flat < count), flat, count)
    rank, numbers = ranks(flat, count)
    ends = jnp.cumsum(grouped.blocks(numbers), dtype=jnp.int32)
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    row = jnp.where(flat < count, grouped.row(first[flat], rank), rows)
    place = row.reshape(tokens, choices)
    slot = jnp.arange(slots, dtype=jnp.int32)
    source = jnp.full(rows, slots, jnp.int32).at[row].set(slot, mode="drop")
    used = first[-1:]
    wanted = grouped.live(jnp.arange(blocks, dtype=jnp.int32), used)
    owner = jnp.minimum(_below(wanted + 1, ends), count - 1)
    expected = slots if expected is None else expected
    return Plan(source, source // choices, place, owner, first, used, expected)


def ranks(
    experts: Int[Array, " slots"], count: int
) -> tuple[Int[Array, " slots"], Int[Array, " e"]]:
    """Return how many earlier slots have a slot's expert, and how many slots each expert has.

    An id of `count` is nobody's. Products with a triangle of ones count, part by part; sorting
    takes many more steps. Sums of float32 are exact here: there are fewer than 2^24 slots.
    """
    part = min(PART, cdiv(experts.size, LINE) * LINE)
    before = jnp.tril(jnp.ones((LINE, LINE), jnp.bfloat16), -1)

    def add(seen, ids):
        chosen = (ids.reshape(-1, LINE, 1) == jnp.arange(count)).astype(jnp.bfloat16)
        in_line = jnp.einsum("ij,cje->cie", before, chosen, preferred_element_type=jnp.float32)
        lines = jnp.sum(chosen, axis=1, dtype=jnp.float32)
        ends = seen + jnp.cumsum(lines, axis=0)
        rank = jnp.sum(chosen * (in_line + (ends - lines)[:, None]), axis=2)
        return ends[-1], rank.reshape(-1).astype(jnp.int32)

    parts = jnp.pad(experts, (0, -experts.size % part), constant_values=count).reshape(-1, part)
    numbers, rank = jax.lax.scan(add, jnp.zeros(count, jnp.float32), parts)
    return rank.reshape(-1)[: experts.size], numbers.astype(jnp.int32)


def _below(bounds: Int[Array, " n"], values: Int[Array, " m"]) -> Int[Array, " n"]:
    """Count the values below each bound by all comparisons at once; a search would loop."""
    return jnp.sum(values < bounds[:, None], axis=1, dtype=jnp.int32)


def make_visits(plan: Plan, size: int) -> Visits:
    """Visit every block in use, and every expert."""
    grouped, count = Grouped(size), plan.first.size - 1
    number = jnp.arange(grouped.most_visits(plan.place.size, count), dtype=jnp.int32)
    blocks = plan.first[1:] - plan.first[:-1]
    ends = jnp.cumsum(jnp.maximum(blocks, 1), dtype=jnp.int32)
    expert = jnp.minimum(_below(number + 1, ends), count - 1)
    within = number - (ends - jnp.maximum(blocks, 1))[expert]
    block = grouped.live(plan.first[expert] + within, plan.used)
    return Visits(expert, block, (within < blocks[expert]).astype(jnp.int32))


# Moving token rows to expert rows and adding expert rows into token rows are each other's
# transposes; both are gathers, because a plan holds the indices of both directions.


def dispatch(x: Float[Array, "t d"], plan: Plan) -> Float[Array, "rows d"]:
    """Copy each token's row to the rows of its experts; rows of nobody are 0."""
    return jnp.take(x, plan.token, axis=0, mode="fill", fill_value=0)


def combine(rows: Float[Array, "rows d"], plan: Plan) -> Float[Array, "t d"]:
    """Add up the rows of each token's experts in float32; places past the end add nothing."""
    chosen = jnp.take(rows, plan.place, axis=0, mode="fill", fill_value=0)
    return jnp.sum(chosen.astype(jnp.float32), axis=1)


def shares(weights: Float[Array, "t a"], plan: Plan) -> Float[Array, "rows 1"]:
    """Return the routing weight of each row, 0 for those of nobody."""
    flat = weights.reshape(-1).astype(jnp.float32)
    return jnp.take(flat, plan.source, mode="fill", fill_value=0)[:, None]
