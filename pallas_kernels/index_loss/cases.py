"""What the indexers of the released models learn from, in CSA layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case
from pallas_kernels.index_loss import index_loss
from pallas_kernels.sparse_attention.cases import MODELS, WIDTH, choice_shapes, choices
from pallas_kernels.sparse_attention.seen import Seen

INDEX_HEADS, INDEX_WIDTH, RATIO = 64, 128, 4
TOKENS = 4096
ARRAYS = 6  # arguments that are not numbers of entries


def cases() -> Iterator[Case]:
    """Yield chosen entries and the range of the warm-up, forward and backward."""
    for name, model in MODELS.items():
        for sparse in (True, False):
            for backward in (False, True):
                yield _case(name, TOKENS, sparse=sparse, backward=backward)
        yield _case(name, model.most_tokens, sparse=True, backward=True)


def _case(name: str, tokens: int, *, sparse: bool, backward: bool) -> Case:
    (heads, topk, _), entries = MODELS[name], tokens // RATIO
    shapes = (
        (tokens, heads, WIDTH), (entries, WIDTH), (tokens, heads),
        (tokens, INDEX_HEADS, INDEX_WIDTH), (tokens, INDEX_HEADS), (entries, INDEX_WIDTH),
    )
    float32 = 2, 4  # log_total and head weights
    arguments = [
        jax.ShapeDtypeStruct((1, *shape), jnp.float32 if i in float32 else jnp.bfloat16)
        for i, shape in enumerate(shapes)
    ]
    numbers = [(1, tokens)] * 2 + choice_shapes(tokens, entries, topk)
    arguments += [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in numbers]
    pairs = sum(min(t // RATIO, topk if sparse else t) for t in range(1, tokens + 1))
    index = 2 * INDEX_HEADS * INDEX_WIDTH * (5 if backward else 1)
    flops = pairs * (2 * heads * WIDTH + index)
    moved = sum(x.size * x.dtype.itemsize for x in arguments[:-1])
    learned = sum(x.size * x.dtype.itemsize for x in arguments[3:ARRAYS])
    return Case(
        "index_loss", f"{name}: {'chosen' if sparse else 'range'}, {tokens:,} tokens, "
        f"{'backward' if backward else 'forward'}",
        _backward(sparse) if backward else _forward(sparse), tuple(arguments), flops,
        moved + 2 * learned * backward, covered=not backward or tokens > TOKENS,
        special=_numbers(tokens, heads, topk),
    )


def _numbers(tokens: int, heads: int, topk: int) -> Callable:
    """Make a row of one document, of whose complete entries random ones are chosen."""

    def make(rng: np.random.Generator) -> dict[int, np.ndarray]:
        end = np.arange(1, tokens + 1) // RATIO
        picks, words = choices(rng, end, topk)
        # What makes probabilities sum to about 1: logits are normal numbers.
        log_total = 0.5 + np.log(np.maximum(end, 1))
        return {
            2: np.broadcast_to(log_total, (1, heads, tokens)).swapaxes(1, 2),
            ARRAYS: np.zeros((1, tokens)), ARRAYS + 1: end[None], ARRAYS + 2: picks,
            ARRAYS + 3: words,
        }

    return make


def _forward(sparse: bool) -> Callable:
    def run(implementation: str):
        def loss(*arguments):
            arrays, (first, *numbers) = arguments[:ARRAYS], arguments[ARRAYS:]
            choice = Seen(first, first, *numbers)
            seen = choice._replace(chosen=None, words=None)
            given = (choice, None) if sparse else (seen, choice)
            return index_loss(*arrays, *given, implementation)

        return loss

    return run


def _backward(sparse: bool) -> Callable:
    def run(implementation: str):
        def gradient(*arguments):
            loss, numbers = _forward(sparse)(implementation), arguments[ARRAYS:]
            (divergence, _), pull_back = jax.vjp(
                lambda *learner: loss(*arguments[:3], *learner, *numbers), *arguments[3:ARRAYS]
            )
            return pull_back((jnp.ones_like(divergence), jnp.zeros_like(divergence)))

        return gradient

    return run
