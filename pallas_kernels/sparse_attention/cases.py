"""Attention of the released models' layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case
from pallas_kernels.sparse_attention import Seen, sparse_attention
from pallas_kernels.sparse_attention.index import Bits
from pallas_kernels.sparse_attention.seen import pack_chosen

WIDTH, WINDOW = 512, 128
CSA, HCA = "CSA", "HCA"
RATIOS = {CSA: 4, HCA: 128}
TOKENS = 4096
CHUNK, CONTEXT = 1024, 2**20  # of a prompt: tokens that are read at once, and all of it


class Model(NamedTuple):
    """What the models differ in."""

    heads: int
    topk: int
    most_tokens: int  # of which queries and results fit into 16 GB


MODELS = {"Flash": Model(64, 512, 65536), "Pro": Model(128, 1024, 32768)}


def cases() -> Iterator[Case]:
    """Yield layers of each kind, forward and backward."""
    for name, model in MODELS.items():
        for kind in ("window", HCA, CSA):
            yield _case(name, model, kind, TOKENS, backward=False)
            yield _case(name, model, kind, TOKENS, backward=True)
            if kind != "window":
                yield _case(name, model, kind, CHUNK, backward=False, before=CONTEXT - CHUNK)
        yield _case(name, model, CSA, model.most_tokens, backward=False)
    yield _case("Flash", MODELS["Flash"], CSA, 32768, backward=True)


def _case(
    name: str, model: Model, kind: str, tokens: int, *, backward: bool, before: int = 0
) -> Case:
    """Make a case of a row, or of its last tokens: those before are seen through a cache."""
    entries = (before + tokens) // RATIOS[kind] if kind in RATIOS else 0
    rows, keys = (tokens, model.heads, WIDTH), (tokens + min(before, WINDOW), WIDTH)
    arguments = [(1, *rows), (1, *keys)] + [(1, entries, WIDTH)] * (entries > 0)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in arguments]
    arguments.append(jax.ShapeDtypeStruct((model.heads,), jnp.float32))
    numbers = [(1, tokens)] * (3 if entries else 1)
    numbers += choice_shapes(tokens, entries, model.topk) if kind == CSA else []
    arguments += [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in numbers]
    pairs = _pairs(model, kind, before, tokens)
    flops = 4 * model.heads * WIDTH * pairs * (3.5 if backward else 1)
    slots = tokens * (WINDOW + {CSA: model.topk, HCA: entries}.get(kind, 0))
    own = 2 * tokens * model.heads * WIDTH * 2 * (2 if backward else 1)
    gathered = 2 * (keys[0] + entries) * WIDTH + 4 * tokens * model.topk * (kind == CSA)
    direction = "forward and backward" if backward else "forward"
    direction += f" after {before:,}" if before else ""
    return Case(
        "sparse_attention", f"{name}: {kind}, {tokens:,} tokens, {direction}",
        _backward(entries) if backward else _forward(entries), tuple(arguments), flops,
        own + gathered, slots / pairs, covered=not backward and not before,
        special=_numbers(model, kind, before, tokens, len(arguments) - len(numbers)),
    )


def _numbers(model: Model, kind: str, before: int, tokens: int, place: int) -> Callable:
    """Make what queries see: a row of one document, random entries of those that are complete."""

    def make(rng: np.random.Generator) -> dict[int, np.ndarray]:
        zeros, count = np.zeros((1, tokens), np.int32), np.arange(tokens) + before + 1
        made = [zeros]
        if kind in RATIOS:
            made += [zeros, (count // RATIOS[kind])[None]]
        if kind == CSA:
            made += choices(rng, count // RATIOS[CSA], model.topk)
        return {place + i: x for i, x in enumerate(made)}

    return make


def choice_shapes(tokens: int, entries: int, topk: int) -> list[tuple[int, ...]]:
    """Return the shapes of chosen entries: a GPU's numbers and a TPU's words of bits."""
    return [(1, tokens, topk), (1, tokens, Bits(entries).words)]


def choices(rng: np.random.Generator, complete: np.ndarray, topk: int) -> list:
    """Choose random ones of the entries that are complete at each query; see `choice_shapes`."""
    picks = np.stack([_picks(rng, n, topk) for n in complete])[None]
    return [picks, pack_chosen(jnp.asarray(picks, jnp.int32), int(complete[-1]))]


def _picks(rng: np.random.Generator, entries: int, topk: int) -> np.ndarray:
    """Return the numbers of topk entries, ascending; -1 where there are no more."""
    picks = np.sort(rng.choice(entries, min(entries, topk), replace=False))
    return np.pad(picks, (0, topk - picks.size), constant_values=-1)


def _pairs(model: Model, kind: str, before: int, tokens: int) -> int:
    """Return how many keys and entries all queries together see."""
    most = {CSA: model.topk, HCA: before + tokens}.get(kind, 0)
    ratio, count = RATIOS.get(kind, 1), range(before + 1, before + tokens + 1)
    return sum(min(t, WINDOW) + min(t // ratio, most) for t in count)


def _forward(entries: int) -> Callable:
    def run(implementation: str):
        def attend(q, keys, *rest):
            given = rest if entries else (None, *rest)
            compressed, sink, *seen = given
            return sparse_attention(
                q, keys, compressed, sink, Seen(*seen), WINDOW, implementation
            )

        return attend

    return run


def _backward(entries: int) -> Callable:
    def run(implementation: str):
        count = 4 if entries else 3

        def gradient(*arguments):
            arrays, seen = arguments[:count], arguments[count:]
            attend = _forward(entries)(implementation)
            (out, _), pull_back = jax.vjp(lambda *arrays: attend(*arrays, *seen), *arrays)
            return pull_back((out, jnp.zeros(out.shape[:3], jnp.float32)))

        return gradient

    return run
