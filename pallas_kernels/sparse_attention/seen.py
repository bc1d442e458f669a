"""What each query sees of keys and compressed entries."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Int


class Seen(NamedTuple):
    """Ranges and numbers, int32.

    Of keys a query sees its window, from `first_key` on; of entries those from `first` to before
    `end`, or, if there are any, the `chosen` ones of these.
    """

    first_key: Int[Array, "b t"]  # first token of the query's document
    first: Int[Array, "b t"] | None = None
    end: Int[Array, "b t"] | None = None
    chosen: Int[Array, "b t l"] | None = None  # negative: none
