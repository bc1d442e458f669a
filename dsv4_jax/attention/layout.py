"""Where documents, windows and compressed entries lie in a row of packed tokens."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.cache import Span
from dsv4_jax.shapes import Array, Bool, Int, Tokens


class EntryLayout(NamedTuple):
    """The compressed entries of one ratio.

    Entries are numbered by the token that completes their block, so those a query sees form one
    range: it starts with the first entry of the query's document and ends with the last block
    complete at the query, the query's own token included. Slots past the last entry belong to
    nobody's range.
    """

    start: Int[Array, "b c"] | None  # first token of the block; None: entry i starts at i * ratio
    has_previous: Bool[Array, "b c"] | None  # a block of the same document comes before it
    first: Int[Array, "b t"]  # first entry a query sees
    end: Int[Array, "b t"]  # one past the last entry a query sees


def number_documents(segment_ids: Tokens) -> Tokens:
    """Number the documents of each row: an id that comes again later is then another document's.

    Documents are contiguous runs of one id; 0, padding, stays 0.
    """
    return jnp.where(segment_ids > 0, jnp.cumsum(_starts(segment_ids), axis=1), 0)


def tokens_ahead(
    tokens: Tokens, segment_ids: Tokens | None, shift: int
) -> tuple[Tokens, Bool[Array, "b t"]]:
    """Return the token `shift` places after each token and whether it is of the same document.

    Where it is not, the token returned is 0. Nothing comes after padding.
    """

    def shifted(x):
        return jnp.pad(x, ((0, 0), (0, shift)))[:, shift:]

    documents = jnp.ones_like(tokens) if segment_ids is None else number_documents(segment_ids)
    exists = (shifted(documents) == documents) & (documents > 0)
    return jnp.where(exists, shifted(tokens), 0), exists


def document_offsets(segment_ids: Tokens) -> Tokens:
    """Return each token's index within its document; documents are contiguous runs of one id."""
    index = jnp.arange(segment_ids.shape[1])
    return index - jax.lax.cummax(jnp.where(_starts(segment_ids), index, 0), axis=1)


def _starts(segment_ids: Tokens) -> Bool[Array, "b t"]:
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)


def entry_layout(
    shape: tuple[int, int], ratio: int, segment_ids: Tokens | None, offsets: Tokens | None
) -> EntryLayout:
    """Lay out the compressed entries of a batch of rows of the given (b, t).

    Every document is compressed on its own grid: block i of a document holds its tokens
    [i * ratio, (i + 1) * ratio); a trailing partial block has no entry. The number of slots,
    t // ratio, suffices for any division into documents.

    Source: fact sheet 2.5 (visibility) and 13 C (packing).
    """
    b, t = shape
    if segment_ids is None:
        end = jnp.broadcast_to((jnp.arange(t) + 1) // ratio, (b, t))
        return EntryLayout(None, None, jnp.zeros_like(end), end)
    completes = ((offsets + 1) % ratio == 0) & (segment_ids > 0)
    end = jnp.cumsum(completes, axis=1)
    first = end - jnp.where(segment_ids > 0, (offsets + 1) // ratio, 0)
    # The slot of the block that a token completes; other tokens write past the last slot.
    slot = jnp.where(completes, end - 1, t // ratio)
    empty = jnp.zeros((b, t // ratio), jnp.int32)
    rows = jnp.arange(b)[:, None]
    start = empty.at[rows, slot].set(jnp.arange(t) - ratio + 1, mode="drop")
    previous = empty.at[rows, slot].set(offsets >= 2 * ratio - 1, mode="drop")
    return EntryLayout(start, previous.astype(bool), first, end)


def blocks_touched(tokens: int, ratio: int) -> int:
    """Return how many blocks a stretch of so many tokens may complete, wherever it starts."""
    return (tokens + ratio - 1) // ratio


def span_layout(span: Span, tokens: int, ratio: int) -> EntryLayout:
    """Lay out the blocks that rows of new tokens may complete, and what each token sees.

    A row is one document; its entries are numbered from its beginning.
    """
    number = span.start[:, None] // ratio + jnp.arange(blocks_touched(tokens, ratio))
    end = (span.start[:, None] + jnp.arange(tokens) + 1) // ratio
    return EntryLayout(number * ratio, number > 0, jnp.zeros_like(end), end)


def block_starts(x: Int[Array, "b t"], layout: EntryLayout, ratio: int) -> Int[Array, "b c"]:
    """Return the value of x at the first token of each entry's block."""
    if layout.start is None:
        return x[:, : x.shape[1] // ratio * ratio : ratio]
    return jnp.take_along_axis(x, layout.start, axis=1)


def window_mask(
    at_query: Int[Array, "b z q"], at_key: Int[Array, "b z s"], window: int,
    segments: tuple[Array, Array] | None,
) -> Bool[Array, "b z q s"]:
    """Return which keys each query of a block sees.

    Args:
      at_query, at_key: positions in the row; negative where there is no key.
      segments: document ids of queries [b, z, q] and of keys [b, z, s], or None.
    """
    at_key = at_key[..., None, :]
    distance = at_query[..., :, None] - at_key
    mask = (distance >= 0) & (distance < window) & (at_key >= 0)
    if segments is not None:
        of_query, of_key = segments
        mask = mask & (of_query[..., :, None] == of_key[..., None, :])
    return mask
