"""Decoding in layers of the released models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cached_attention import Cached, cached_attention
from pallas_kernels.cached_attention.formats import Form
from pallas_kernels.case import Case

FORM, WINDOW = Form(512, 64, True), 128
CSA, HCA = "CSA", "HCA"
RATIOS = {CSA: 4, HCA: 128}
LAYERS = 2
SHAPES = ((1, 2**17), (32, 2**17), (128, 2**17), (1, 2**20))  # rows, context


class Model(NamedTuple):
    """What the models differ in."""

    heads: int
    topk: int


MODELS = {"Flash": Model(64, 512), "Pro": Model(128, 1024)}


def cases() -> Iterator[Case]:
    """Yield one new token of each row in layers of each kind."""
    for name, model in MODELS.items():
        for rows, context in SHAPES:
            for kind in (HCA, CSA):
                yield _case(name, model, kind, rows, context, 1)
        yield _case(name, model, "window", 128, 2**17, 1)
        yield _case(name, model, HCA, 32, 2**17, 2)


def _case(name: str, model: Model, kind: str, rows: int, context: int, tokens: int) -> Case:
    slots = context // RATIOS[kind] if kind in RATIOS else 0
    seen = {CSA: model.topk, HCA: slots}.get(kind, 0)
    queries, byte = (rows, tokens), jnp.uint8
    arguments = [
        jax.ShapeDtypeStruct((*queries, model.heads, FORM.channels), jnp.bfloat16),
        jax.ShapeDtypeStruct((*queries, FORM.width), byte),
        jax.ShapeDtypeStruct((model.heads,), jnp.float32),
        jax.ShapeDtypeStruct((LAYERS, rows, WINDOW, FORM.width), byte),
        jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32),
    ]
    if slots:
        numbers = (*queries, model.topk) if kind == CSA else queries
        arguments += [
            jax.ShapeDtypeStruct((LAYERS, rows, slots, FORM.width), byte),
            jax.ShapeDtypeStruct(numbers, jnp.int32),
        ]
    keys = rows * tokens * (WINDOW + seen)
    own = 2 * 2 * rows * tokens * model.heads * FORM.channels
    return Case(
        "cached_attention", f"{name}: {kind}, {rows} x {tokens}, context {context:,}",
        _run(kind), tuple(arguments), 4 * model.heads * FORM.channels * keys,
        # Queries of a row share what they see, but for chosen entries.
        FORM.width * (keys if kind == CSA else keys // tokens) + own,
        special=_numbers(kind, rows, tokens, context, slots, model.topk),
        covered=kind != "window" and (rows, tokens) != (32, 1),
    )


def _run(kind: str) -> Callable:
    def run(implementation: str):
        def attend(q, new, sink, ring, layer, start, *entries):
            cached = Cached(ring, layer, start, *entries[:1])
            if entries:
                field = "chosen" if kind == CSA else "end"
                cached = cached._replace(**{field: entries[1]})
            return cached_attention(
                q, new, sink, cached, rotated=FORM.rotated, implementation=implementation
            )

        return attend

    return run


def _numbers(
    kind: str, rows: int, tokens: int, context: int, slots: int, topk: int
) -> Callable[[np.random.Generator], dict[int, np.ndarray]]:
    """Make bytes whose numbers are finite, full rows, and random chosen entries."""

    def stored(rng, shape):
        # Powers of two about 1; the high bytes of bfloat16 numbers below 2.
        found = rng.integers(0, 64, shape, np.uint8)
        found[..., FORM.scales :] = 127
        return found

    def make(rng: np.random.Generator) -> dict[int, np.ndarray]:
        made = {
            1: stored(rng, (rows, tokens, FORM.width)),
            3: stored(rng, (LAYERS, rows, WINDOW, FORM.width)),
            4: np.int32(1), 5: np.full(rows, context - tokens),
        }
        if slots:
            made[6] = stored(rng, (LAYERS, rows, slots, FORM.width))
            made[7] = np.full((rows, tokens), slots)
        if kind == CSA:
            picks = [rng.choice(slots, topk, replace=False) for _ in range(rows * tokens)]
            made[7] = np.sort(np.stack(picks), axis=1).reshape(rows, tokens, topk)
        return made

    return make
