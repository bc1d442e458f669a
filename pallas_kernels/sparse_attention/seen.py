"""What each query sees of keys and compressed entries."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.sparse_attention.index import Bits
from pallas_kernels.sparse_attention.reference import chosen_mask, range_mask


class Seen(NamedTuple):
    """Ranges and numbers, int32.

    Of keys a query sees its window, from `first_key` on; of entries those from `first` to before
    `end` or, where these are given, the chosen ones of them.
    """

    first_key: Int[Array, "b t"]  # first token of the query's document
    first: Int[Array, "b t"] | None = None
    end: Int[Array, "b t"] | None = None
    chosen: Int[Array, "b t l"] | None = None  # numbers of entries, each once; negative: none
    words: Int[Array, "b t w"] | None = None  # or chosen entries as `Bits`, which TPUs take


def unpacked(words: Int[Array, "b t w"], entries: int) -> Bool[Array, "b t c"]:
    """Return which entries are chosen."""
    bits, entry = Bits(entries), jnp.arange(entries)
    return (words[:, :, bits.word(entry)] >> bits.bit(entry)) & 1 == 1


def entry_mask(seen: Seen, entries: int) -> Bool[Array, "b t c"]:
    """Return which entries queries see."""
    if seen.chosen is not None:
        return chosen_mask(seen.chosen, entries)
    if seen.words is not None:
        return unpacked(seen.words, entries)
    return range_mask(seen.first, seen.end, entries)


def pack_chosen(chosen: Int[Array, "b t l"], entries: int) -> Int[Array, "b t w"]:
    """Return chosen entries as `Bits`."""
    bits = Bits(entries)
    entry = jnp.maximum(chosen, 0)
    word = jnp.where(chosen >= 0, bits.word(entry), bits.words)
    value = jnp.left_shift(1, bits.bit(entry))
    empty = jnp.zeros((*chosen.shape[:2], bits.words), jnp.int32)
    scatter = jax.vmap(jax.vmap(lambda row, at, x: row.at[at].add(x, mode="drop")))
    return scatter(empty, word, value)
