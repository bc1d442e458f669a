"""The indexers of the released models' CSA layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case
from pallas_kernels.indexer import select
from pallas_kernels.sparse_attention.seen import Seen

HEADS, WIDTH, RATIO = 64, 128, 4
TOPK = {"Flash": 512, "Pro": 1024}
TOKENS = (4096, 65536)


def cases() -> Iterator[Case]:
    """Yield the choice of entries in short and long rows."""
    for model, topk in TOPK.items():
        for tokens in TOKENS:
            entries = tokens // RATIO
            queries, keys = (tokens, HEADS, WIDTH), (entries, WIDTH)
            arrays = [
                jax.ShapeDtypeStruct((1, *shape), jnp.bfloat16)
                for shape in (queries, queries[:2], keys)
            ]
            numbers = [jax.ShapeDtypeStruct((1, tokens), jnp.int32)] * 2
            pairs = sum((t + 1) // RATIO for t in range(tokens))
            moved = 2 * (tokens * HEADS * (WIDTH + 1) + entries * WIDTH) + 4 * tokens * topk
            yield Case(
                "indexer", f"{model}: {tokens:,} tokens", _select(topk), (*arrays, *numbers),
                2 * HEADS * WIDTH * pairs, moved, special=_ranges(tokens),
            )


def _ranges(tokens: int) -> Callable:
    """Make the entries that queries see: all that are complete."""
    return lambda rng: {
        3: np.zeros((1, tokens), np.int32), 4: (np.arange(1, tokens + 1) // RATIO)[None],
    }


def _select(topk: int):
    def run(implementation: str):
        def chosen(queries, head_weights, keys, first, end):
            seen = Seen(first, first, end)
            found = select(queries, head_weights, keys, seen, topk, implementation)
            return found.words if found.chosen is None else found.chosen

        return chosen

    return run
