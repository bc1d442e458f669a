"""The cross-entropy of a language model's head, fused with its product: no logits are stored.

Tokens are taken in pieces of at most PIECE. A kernel computes the logits of a piece tile by tile in
float32. Where gradients are wanted they are made at once, with three large products in all: the
kernel's, and two of XLA: these are plain and large, and nothing is to be fused with them.

Memory, for t tokens, width d, v ids and p = min(t, PIECE), in numbers of the dtype of hidden unless
float32 is named:

- value, scores: 3 [p, tiles] in float32 and int32, where a tile has 128 to 512 ids; the head in the
  dtype of hidden if it is of another.
- gradients, besides: exponentials [p, v] of a piece, which errors then take the place of; the
  gradients [t, d], and [d, v] in float32, in which pieces are summed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.cross_entropy import gpu, reference, tpu
from pallas_kernels.cross_entropy.index import Tile
from pallas_kernels.implementation import AUTO, XLA, choose
from pallas_kernels.index_math import cdiv

# Every piece reads and writes the float32 gradient of the head: at 4,096 tokens and bfloat16 that
# is 8 bytes to 24,576 operations. Exponentials of so many tokens take 1 GiB at 129,280 ids.
PIECE = 4096
DTYPES = ("bfloat16", "float32")
WORTHWHILE = 1024  # ids, below which the logits are not large

KERNELS = {"gpu": gpu, "tpu": tpu}


def token_nats(
    hidden: Float[Array, "t d"], head: Float[Array, "d v"], targets: Int[Array, " t"],
    weights: Float[Array, " t"], implementation: str = AUTO,
) -> Float[Array, ""]:
    """Return the weighted sum of -log softmax(hidden head)[target], in nats, float32.

    The head is used in the dtype of hidden. Differentiable in hidden, head and weights.

    Args:
      targets: ids from 0 to v - 1, also where the weight is 0.
    Raises:
      ValueError: there is no such implementation, or it does not take these arrays.
    """
    chosen = _choose(hidden, head, targets, implementation)
    if chosen == XLA:
        return reference.token_nats(hidden, head, targets, weights)
    return _token_nats(hidden, head, targets, weights, chosen)


def token_scores(
    hidden: Float[Array, "t d"], head: Float[Array, "d v"], targets: Int[Array, " t"],
    implementation: str = AUTO,
) -> tuple[Float[Array, " t"], Bool[Array, " t"]]:
    """Return log softmax(hidden head)[target] in nats, and whether the target is the likeliest id.

    Of ids that are equally likely the lowest counts as the likeliest. Not differentiable in a
    kernel.

    Raises:
      ValueError: as for `token_nats`.
    """
    chosen = _choose(hidden, head, targets, implementation)
    if chosen == XLA:
        return reference.token_scores(hidden, head, targets)
    return _scores(hidden, head, targets, chosen)


def choose_for(hidden: Array, head: Array, implementation: str) -> str:
    """Return "xla", "gpu" or "tpu".

    Raises:
      ValueError: there is no such implementation, or its kernels do not take these arrays.
    """
    worthwhile = head.shape[1] >= WORTHWHILE and hidden.dtype.name in DTYPES
    chosen = choose("cross_entropy", implementation, worthwhile=worthwhile)
    if chosen != XLA and hidden.dtype.name not in DTYPES:
        raise ValueError(
            f"cross_entropy: expected hidden in {' or '.join(DTYPES)}, got {hidden.dtype.name}"
        )
    return chosen


def _choose(hidden: Array, head: Array, targets: Array, implementation: str) -> str:
    chosen = choose_for(hidden, head, implementation)
    if hidden.ndim != 2 or hidden.shape != (*targets.shape, *head.shape[:1]) or not hidden.size:
        raise ValueError(
            "cross_entropy: expected hidden [t, d], head [d, v] and targets [t], none empty, got "
            f"{hidden.shape}, {head.shape} and {targets.shape}"
        )
    return chosen


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _token_nats(hidden, head, targets, weights, kernel):
    return -jnp.sum(weights * _scores(hidden, head, targets, kernel)[0])


def _forward(hidden, head, targets, weights, kernel):
    """Return the nats and their gradients.

    With e = weights (softmax - one-hot) these are e head^T, hidden^T e and each token's own nats.
    """
    module, matrix = KERNELS[kernel], head.astype(hidden.dtype)
    tile, size, count = _pieces(hidden, module)

    def piece(grad_head, tokens):
        hidden, targets, weights = tokens
        tiles = module.logit_tiles(hidden, matrix, targets, tile, exps=True)
        factors, own = tiles.factors(weights)
        error = module.errors(tiles.exps, factors, targets, own, tile)
        grad_hidden = jnp.einsum("tv,dv->td", error, matrix)
        product = jnp.einsum("td,tv->dv", hidden, error, preferred_element_type=jnp.float32)
        return grad_head + product, (tiles.log_total() - tiles.target, grad_hidden)

    start = jnp.zeros(head.shape, jnp.float32)
    tokens = hidden, targets, weights.astype(jnp.float32)
    grad_head, (nats, grad_hidden) = _scan(piece, start, tokens, size, count)
    kept = grad_hidden, grad_head.astype(head.dtype), nats.astype(weights.dtype)
    return jnp.sum(weights * nats), kept


def _backward(kernel, kept, scale):
    grad_hidden, grad_head, grad_weights = ((scale * g).astype(g.dtype) for g in kept)
    return grad_hidden, grad_head, None, grad_weights


_token_nats.defvjp(_forward, _backward)


def _scores(hidden: Array, head: Array, targets: Array, kernel: str) -> tuple[Array, Array]:
    module, head = KERNELS[kernel], head.astype(hidden.dtype)
    tile, size, count = _pieces(hidden, module)

    def piece(carry, tokens):
        hidden, targets = tokens
        tiles = module.logit_tiles(hidden, head, targets, tile, exps=False)
        return carry, (tiles.target - tiles.log_total(), tiles.hit(targets))

    return _scan(piece, (), (hidden, targets), size, count)[1]


def _pieces(hidden: Float[Array, "t d"], module) -> tuple[Tile, int, int]:
    """Return the tile, the tokens of a piece, which are rows of whole tiles, and their number."""
    t, d = hidden.shape
    count = cdiv(t, PIECE)
    tile = module.tile_for(cdiv(t, count), d, hidden.dtype)
    return tile, cdiv(cdiv(t, count), tile.rows) * tile.rows, count


def _scan(piece: Callable, carry, tokens: tuple[Array, ...], size: int, count: int):
    """Apply `piece` to pieces of tokens, as `jax.lax.scan` does, and join what it returns.

    The last piece is filled up with zeros.
    """
    t = tokens[0].shape[0]
    tokens = tuple(
        jnp.pad(x, ((0, count * size - t), *((0, 0),) * (x.ndim - 1))) for x in tokens
    )
    if count == 1:
        carry, outs = piece(carry, tokens)
        return carry, jax.tree.map(lambda x: x[:t], outs)
    tokens = jax.tree.map(lambda x: x.reshape(count, size, *x.shape[1:]), tokens)
    carry, outs = jax.lax.scan(piece, carry, tokens)
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:t], outs)
