"""The indexers of the released models' CSA layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case
from pallas_kernels.indexer import select, select_stored
from pallas_kernels.indexer.keys import stored_width
from pallas_kernels.sparse_attention.cases import CHUNK, CONTEXT
from pallas_kernels.sparse_attention.seen import Seen

HEADS, WIDTH, RATIO = 64, 128, 4
TOPK = {"Flash": 512, "Pro": 1024}
TOKENS = (4096, 65536)

CONTEXTS, BATCHES = (2**17, CONTEXT), (1, 32, 128)  # tokens and rows at a step of generation
LAYERS = 2  # of the cache: how many there are is of no account


def cases() -> Iterator[Case]:
    """Yield the choice of entries in short and long rows, and that of one token over a cache."""
    yield from _choices()
    for model, topk in TOPK.items():
        for context in CONTEXTS:
            for rows in BATCHES:
                yield _stored_case(model, topk, context, rows)


def _stored_case(model: str, topk: int, context: int, rows: int) -> Case:
    """Make a case in which all rows are as long as the cache, in FP4."""
    entries, width = context // RATIO, stored_width(WIDTH, packed=True)
    queries = (rows, 1, HEADS, WIDTH)
    arguments = (
        jax.ShapeDtypeStruct(queries, jnp.bfloat16),
        jax.ShapeDtypeStruct(queries[:3], jnp.float32),
        jax.ShapeDtypeStruct((LAYERS, rows, entries, width), jnp.uint8),
        jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((rows, 1), jnp.int32),
    )

    def run(implementation: str):
        return lambda *arrays: select_stored(*arrays, topk, implementation)

    def special(rng) -> dict[int, np.ndarray]:
        scales = rng.integers(122, 132, (LAYERS, rows, entries, WIDTH // 32), np.uint8)
        codes = rng.integers(0, 256, (LAYERS, rows, entries, WIDTH // 2), np.uint8)
        cache = np.concatenate([codes, scales], axis=-1)
        return {2: cache, 3: np.int32(1), 4: np.full((rows, 1), entries)}

    return Case(
        "indexer", f"{model}: generation, {context:,} tokens, rows: {rows}", run, arguments,
        2 * HEADS * WIDTH * rows * entries,
        rows * (entries * width + HEADS * (2 * WIDTH + 4) + 4 * topk),
        covered=context < CONTEXTS[-1] or rows == 32, special=special,
    )


def _choices() -> Iterator[Case]:
    for model, topk in TOPK.items():
        for tokens in TOKENS:
            yield _choice(model, topk, 0, tokens)
        yield _choice(model, topk, CONTEXT - CHUNK, CHUNK)


def _choice(model: str, topk: int, before: int, tokens: int) -> Case:
    """Make a case of a row, or of a prompt's last tokens, which compare as served models do."""
    end = (np.arange(tokens) + before + 1) // RATIO
    entries, queries = int(end[-1]), (tokens, HEADS, WIDTH)
    arrays = [
        jax.ShapeDtypeStruct((1, *shape), jnp.bfloat16)
        for shape in (queries, queries[:2], (entries, WIDTH))
    ]
    numbers = [jax.ShapeDtypeStruct((1, tokens), jnp.int32)] * 2
    name = f"{model}: {tokens:,} tokens" + (f" after {before:,}" if before else "")
    return Case(
        "indexer", name, _select(topk, rounded=before > 0), (*arrays, *numbers),
        2 * HEADS * WIDTH * int(end.sum()),
        2 * (tokens * HEADS * (WIDTH + 1) + entries * WIDTH) + 4 * tokens * topk,
        special=lambda rng: {3: np.zeros((1, tokens), np.int32), 4: end[None]},
    )


def _select(topk: int, *, rounded: bool) -> Callable:
    def run(implementation: str):
        def chosen(queries, head_weights, keys, first, end):
            seen = Seen(first, first, end)
            found = select(
                queries, head_weights, keys, seen, topk, implementation, rounded=rounded
            )
            return found.words if found.chosen is None else found.chosen

        return chosen

    return run
